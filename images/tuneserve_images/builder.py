"""How one step is built: debootstrap and buildah, each image into the builder's store or straight into the layout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

from tuneserve_images.layout import Layout, full_name
from tuneserve_images.programs import Runner, apart, uv_binary, uv_cache
from tuneserve_images.recipes import DEBIAN_PACKAGES, DEBIAN_SUITE, STEPS, BuildError, Recipes, Step
from tuneserve_images.settings import Folders

DEBIAN_MIRROR = "http://deb.debian.org/debian"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Where a container finds this machine's downloads of uv. Not uv's own default: the Dockerfiles mount a cache there.
UV_CACHE = "/tmp/build/uv-cache"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of this machine, not of the image.
FILES_LEFT_OUT = ("etc/hostname", "etc/resolv.conf")
# Of no use in an image: the folders stay, empty.
EMPTIED = (
    "dev",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
)


def kept_in_image(name: str) -> bool:
    """Whether a path of the root file system, such as `./usr/bin/env`, belongs into the image."""
    path = name.removeprefix("./")
    return path not in FILES_LEFT_OUT and not any(path.startswith(f"{folder}/") for folder in EMPTIED)


class Builder:
    """One cache's store and layout."""

    def __init__(self, *, folders: Folders, recipes: Recipes) -> None:
        self.folders = folders
        self.recipes = recipes
        self.layout = Layout(folders.layout)
        self.runner = Runner(logs=folders.build / "log")
        self._publishing = threading.Lock()

    def prepare(self) -> None:
        """Remove what an interrupted build left behind."""
        for log in self.runner.logs.glob("*.log"):
            log.unlink()
        self._buildah("rm", "--all", log="buildah")

    def has(self, name: str) -> bool:
        """Whether a step needs no build."""
        if STEPS[name].published:
            return self.layout.has(self.recipes.reference(name))
        return self._stored(name) in self._store_names()

    def build(self, name: str) -> None:
        """Build one step whose parent is there; raises BuildError."""
        step = STEPS[name]
        if step.dockerfile is None:
            self._build_debian(step)
        elif step.published:
            # One at a time: the second finds the layers that it shares with the first.
            with self._publishing:
                scratch = self.layout.scratch(self.folders.scratch / name)
                target = f"oci:{scratch.folder}:{full_name(self.recipes.reference(name))}"
                self._build_dockerfile(step, output=target)
                self.layout.add(self.recipes.reference(name), built=scratch)
        else:
            self._build_dockerfile(step, output=self._stored(name))

    def prune(self) -> None:
        """Remove from the store and the layout what no build and no cluster needs any more."""
        self.layout.prune()
        keep = {self._stored(step.name) for step in STEPS.values() if step.kept}
        old = sorted(name for name in self._store_names() if name not in keep)
        if old:
            self._buildah("rmi", *old, log="prune")
        shutil.rmtree(self.folders.scratch, ignore_errors=True)

    def _build_debian(self, step: Step) -> None:
        root = self.folders.scratch / "debian"
        archive = self.folders.scratch / "debian.tar"
        mirror = os.environ.get("DEBIAN_MIRROR", DEBIAN_MIRROR)
        include = f"--include={','.join(DEBIAN_PACKAGES)}"
        self._run("debootstrap", "--variant=minbase", include, DEBIAN_SUITE, root, mirror, log=step.name)
        with tarfile.open(archive, "w") as tar:
            tar.add(root, arcname=".", filter=lambda entry: entry if kept_in_image(entry.name) else None)
        shutil.rmtree(root)
        container = "tuneserve-debian"
        self._buildah("from", "--name", container, "scratch", log=step.name)
        self._buildah("add", "--quiet", container, archive, "/", log=step.name)
        self._buildah("config", "--env", f"PATH={PATH}", "--cmd", "python3", container, log=step.name)
        self._buildah("commit", "--quiet", "--rm", container, self._stored(step.name), log=step.name)
        archive.unlink()

    def _build_dockerfile(self, step: Step, *, output: str) -> None:
        assert step.dockerfile and step.parent
        words = ["build", "--layers=false", "--disable-compression", "--isolation", "chroot", "--network", "host"]
        words += ["--file", step.dockerfile, "--tag", output]
        parent = self._stored(step.parent)
        if step.published:
            words += ["--build-context", f"environment=container-image://{parent}"]
        else:
            words += ["--build-arg", f"BASE_IMAGE={parent}", "--target", str(step.target)]
            words += ["--build-context", f"uv={self._uv_folder(step)}"]
            words += ["--volume", f"{uv_cache()}:{UV_CACHE}", "--build-arg", f"UV_CACHE_DIR={UV_CACHE}"]
            bundle = Path(os.environ.get("SSL_CERT_FILE") or CERTIFICATES)
            if bundle.exists():
                # This machine may reach its package index through an authority of its own. Nothing of it stays.
                words += ["--volume", f"{bundle}:{CERTIFICATES}:ro"]
        self._buildah(*words, ".", log=step.name)

    def _uv_folder(self, step: Step) -> Path:
        """A folder that stands for the image of uv: it has the binary, and nothing else."""
        folder = self.folders.scratch / f"uv-{step.name}"
        folder.mkdir()
        shutil.copy2(uv_binary(), folder / "uv")
        return folder

    def _stored(self, name: str) -> str:
        return f"localhost/{self.recipes.reference(name)}"

    def _store_names(self) -> set[str]:
        done = subprocess.run(
            apart(self._command("images", "--json")),
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"buildah cannot read its store: {done.stderr.strip()}")
        return {name for image in json.loads(done.stdout or "[]") or [] for name in image.get("names") or []}

    def _command(self, *words: str | Path) -> list[str | Path]:
        store = ["--root", str(self.folders.build / "store"), "--runroot", str(self.folders.build / "run")]
        return ["buildah", *store, "--storage-driver", "overlay", *words]

    def _buildah(self, *words: str | Path, log: str) -> None:
        self._run(*self._command(*words), log=log)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self._own_environment()}

    def _own_environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self.folders.scratch / "tmp"), "STORAGE_DRIVER": "overlay"}

    def _run(self, *words: str | Path, log: str) -> None:
        self.runner.run(words, log=log, environment=self._own_environment(), cwd=self.recipes.root)

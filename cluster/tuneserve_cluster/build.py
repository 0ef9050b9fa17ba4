"""Builds every binary from Go modules, into a folder named by the hash of what it is built from.

What shares the k8s.io libraries is one Go module: compiled once, they serve
Kubernetes, KWOK, CoreDNS, the volume provisioner and helm. etcd and containerd
pin versions of their own that clash with them, so they are modules of their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from tuneserve_cluster import images, packages
from tuneserve_cluster.errors import ClusterError, run
from tuneserve_cluster.settings import GO_SOURCES, is_external

OLDEST_GO = (1, 26)
# Part of the hash: raise it when the same sources are built into something else.
RECIPE = "1"
KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "kubeadm",
)


@dataclass(frozen=True)
class Part:
    """Programs of one module that are built together."""

    title: str
    usual: str
    module: str
    packages: tuple[str, ...]
    stamps: dict[str, str] = field(default_factory=dict)
    renames: dict[str, str] = field(default_factory=dict)


def pinned(module: str, dependency: str) -> str:
    """The version of a dependency in a module's go.mod, the only place where versions are written."""
    text = (GO_SOURCES / module / "go.mod").read_text()
    found = re.search(rf"^(?:require )?\s*{re.escape(dependency)} (v\S+)", text, re.MULTILINE)
    if found is None:
        raise ClusterError(f"go/{module}/go.mod does not pin {dependency}")
    return found.group(1)


def kubernetes_version() -> str:
    return pinned("kubernetes", "k8s.io/kubernetes")


def parts() -> list[Part]:
    """In the order in which they are built: the longest first, for what the others share with it."""
    version = kubernetes_version()
    major, minor = version.removeprefix("v").split(".")[:2]
    stamps: dict[str, str] = {}
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        # Without these, clients see v0.0.0-master and refuse to talk to "such an old" server.
        stamps |= {f"{package}.gitVersion": version, f"{package}.gitMajor": major, f"{package}.gitMinor": minor}
        stamps |= {f"{package}.gitTreeState": "clean"}
    containerd = "github.com/containerd/containerd/v2"
    helm = "helm.sh/helm/v4"
    return [
        Part(
            "kube-apiserver and 6 more",
            "about 6 min",
            "kubernetes",
            tuple(f"k8s.io/kubernetes/cmd/{name}" for name in KUBERNETES),
            stamps,
        ),
        Part(
            "containerd, its shim and ctr",
            "about 1 min",
            "containerd",
            tuple(f"{containerd}/cmd/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")),
            {f"{containerd}/version.Version": pinned("containerd", containerd).removeprefix("v")},
        ),
        Part(
            "etcd and etcdctl",
            "about half a minute",
            "etcd",
            ("go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/etcdctl/v3"),
            renames={"server": "etcd"},
        ),
        Part("coredns", "about 20 s", "kubernetes", ("./coredns",)),
        Part(
            "kwok and local-path-provisioner",
            "about 20 s",
            "kubernetes",
            ("sigs.k8s.io/kwok/cmd/kwok", "github.com/rancher/local-path-provisioner"),
        ),
        Part(
            "helm",
            "about half a minute",
            "kubernetes",
            (f"{helm}/cmd/helm",),
            {f"{helm}/internal/version.version": pinned("kubernetes", helm)},
        ),
        Part("pause", "a second", "pause", (".",)),
    ]


def source_hash() -> str:
    """Of all that decides what the binaries are."""
    digest = hashlib.sha256(RECIPE.encode())
    for path in sorted(GO_SOURCES.rglob("*")):
        if path.name in ("go.mod", "go.sum") or path.suffix == ".go":
            digest.update(f"{path.relative_to(GO_SOURCES)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def built(cache: Path) -> Path | None:
    """The folder of the binaries, if they are built."""
    folder = cache / "bin" / source_hash()
    return folder if folder.is_dir() else None


def go_environment(cache: Path) -> tuple[Path, dict[str, str]]:
    """The Go program and what it runs under; a sentence if there is none that is new enough."""
    found = shutil.which("go", path=f"{packages.SEARCH_PATH}:{cache}/tools/bin:/usr/local/go/bin")
    wanted = ".".join(map(str, OLDEST_GO))
    if found is None:
        raise ClusterError(
            f"no Go toolchain: install Go {wanted} or newer (a release into /usr/local/go, or on PATH) and run it again"
        )
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOWORK": "off"}
    said = run(
        [found, "env", "GOVERSION"], "go does not run", env={**environment, "GOTOOLCHAIN": "local"}, cwd=Path("/")
    )
    version = tuple(int(number) for number in re.findall(r"\d+", said)[:2])
    if version >= OLDEST_GO:
        environment["GOTOOLCHAIN"] = "local"
    elif version >= (1, 21):
        environment["GOTOOLCHAIN"] = "auto"  # it fetches the newer one itself, as go.mod asks
    else:
        raise ClusterError(f"{found} is {said.strip()}: install Go {wanted} or newer and run it again")
    return Path(found), environment


def build(cache: Path) -> Path:
    """Builds what is not built yet; returns the folder. Readers never see half of it."""
    if is_external():
        raise ClusterError("CLUSTER=external: there is nothing to build for a cluster of your own")
    if os.geteuid() != 0:
        raise ClusterError("run it as root: it installs packages, and later makes namespaces")
    packages.install_missing()
    (cache / "bin").mkdir(parents=True, exist_ok=True)
    with (cache / "bin" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = built(cache)
        if folder is None:
            folder = _build(cache)
        _remove_old(cache, keep=folder)
    return folder


def _build(cache: Path) -> Path:
    go, environment = go_environment(cache)
    folder = cache / "bin" / source_hash()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    begun = time.monotonic()
    for part in parts():
        print(f"building {part.title}: {part.usual} on 2 cores", flush=True)
        start = time.monotonic()
        flags = " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in part.stamps.items())])
        run(
            ["nice", go, "build", "-trimpath", "-ldflags", flags, "-o", f"{partial}/", *part.packages],
            f"{part.title} could not be built (the Go module proxy must be reachable: GOPROXY)",
            env=environment,
            cwd=GO_SOURCES / part.module,
        )
        for old, new in part.renames.items():
            (partial / old).rename(partial / new)
        print(f"  built in {time.monotonic() - start:.0f} s", flush=True)
    _copy_stages(go, environment, partial)
    images.write_system_images(partial, partial / "system-images")
    partial.rename(folder)
    print(f"built everything in {time.monotonic() - begun:.0f} s: {folder}", flush=True)
    return folder


def _copy_stages(go: Path, environment: dict[str, str], folder: Path) -> None:
    """KWOK's own stages for nodes lie in its module; copied now, so that `up` needs no Go."""
    said = run(
        [go, "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok"],
        "KWOK's module is not to be found",
        env=environment,
        cwd=GO_SOURCES / "kubernetes",
    )
    stages = Path(said.strip()) / "kustomize" / "stage"
    wanted = (
        "node/fast/node-initialize.yaml",
        "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
        "pod/fast/pod-ready.yaml",
    )
    (folder / "kwok-stages.yaml").write_text("\n---\n".join((stages / name).read_text() for name in wanted))


def _remove_old(cache: Path, keep: Path) -> None:
    """Folders of other hashes, but for those that a cluster still runs from."""
    in_use = {link.resolve() for link in (cache / "clusters").glob("*/bin")}
    for folder in (cache / "bin").iterdir():
        if folder.is_dir() and folder != keep and folder.resolve() not in in_use:
            shutil.rmtree(folder)

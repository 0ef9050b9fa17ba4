"""containerd's image store: what is in it, what goes in, what is cleaned out.

Everything goes through `ctr` in the namespace k8s.io, where the kubelet looks.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tuneserve_cluster import oci
from tuneserve_cluster.errors import ClusterError, run
from tuneserve_cluster.node import Node
from tuneserve_cluster.settings import SYSTEM_REGISTRY, Cluster

PRUNED = "docker.io/tuneserve/"


@dataclass(frozen=True)
class Loaded:
    """What `load` did with one image."""

    name: str
    new: bool
    sent_bytes: int


class ImageStore:
    """One cluster's images."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self.cluster = cluster
        self.node = node

    def _ctr(self, *arguments: str) -> list[str | Path]:
        return self.node.enter(
            [self.cluster.bin / "ctr", "-a", self.cluster.containerd_socket, "-n", "k8s.io", *arguments]
        )

    def ctr(self, *arguments: str) -> str:
        return run(self._ctr(*arguments), f"ctr {' '.join(arguments[:2])} failed")

    def answers(self) -> bool:
        return subprocess.run(self._ctr("version"), capture_output=True, check=False).returncode == 0

    def all(self) -> dict[str, str]:
        """Every image record: name -> digest. (For each image the CRI adds records by digest.)"""
        rows = [line.split() for line in self.ctr("images", "ls").splitlines()[1:]]
        return {row[0]: row[2] for row in rows if len(row) > 2}

    def named(self) -> dict[str, str]:
        return {
            name: digest for name, digest in self.all().items() if "@" not in name and not name.startswith("sha256:")
        }

    def load(self, path: Path) -> list[Loaded]:
        """Imports what is new of a layout or archive, and of it only the blobs that the store does not have."""
        with oci.open_source(path) as source:
            found = oci.images(source)
            present = self.named()
            wanted = [image for image in found if oci.is_new(image, present)]
            sizes = dict.fromkeys((image.name for image in found), 0)
            if wanted:
                have = set(self.ctr("content", "ls", "-q").split())
                # The manifest is sent always: containerd takes nothing from an index whose manifests it does not see.
                blobs = oci.missing_blobs(wanted, have - {image.digest for image in wanted})
                for image in wanted:
                    sizes[image.name] = sum(source.size(oci.blob_path(d)) for d in image.blobs if d in blobs)
                self._import(source, wanted, blobs)
            names = {image.name for image in wanted}
            return [Loaded(image.name, image.name in names, sizes[image.name]) for image in found]

    def _import(self, source: oci.Source, wanted: list[oci.Image], blobs: list[str]) -> None:
        with tempfile.TemporaryFile() as said:
            # --local: the transfer service, which is the default, insists that every blob is in the archive.
            command = self._ctr("images", "import", "--local", "-")
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said) as importing:
                assert importing.stdin is not None
                try:
                    oci.write_tar(importing.stdin, source, wanted, blobs)
                    importing.stdin.close()
                except BrokenPipeError:
                    pass  # ctr has given up: it says why
                except FileNotFoundError as error:
                    importing.kill()
                    raise ClusterError(f"the layout is incomplete: {error} is missing") from None
            if importing.returncode:
                said.seek(0)
                raise ClusterError(
                    f"containerd refuses {wanted[0].name}: {said.read().decode(errors='replace').strip()[-800:]}"
                )

    def remove(self, names: Collection[str]) -> None:
        """Removes images, and the records by digest that the CRI made for them, which would keep their layers."""
        records = self.all()
        gone = {records[name] for name in names if name in records}
        kept = {digest for name, digest in self.named().items() if name not in names}
        orphans = [name for name, digest in records.items() if digest in gone - kept]
        doomed = list(dict.fromkeys([*names, *orphans]))
        if doomed:
            self.ctr("images", "rm", "--sync", *doomed)

    def prune(self, keep: Collection[str]) -> list[str]:
        """Removes the product's images that are not in `keep`; the names of what went."""
        wanted = {oci.normalise(name) for name in keep}
        doomed = [name for name in self.named() if name.startswith(PRUNED) and name not in wanted]
        self.remove(doomed)
        return doomed

    def stale_containers(self) -> bool:
        """Removes the records of containers whose processes an earlier `down` ended; whether there were any.

        containerd must be restarted afterwards: its CRI part reads them once, when it starts.
        """
        containers = self.ctr("containers", "ls", "-q").split()
        if containers:
            self.ctr("containers", "rm", *containers)
        sandboxes = [line.split()[0] for line in self.ctr("sandboxes", "ls").splitlines()[1:] if line.strip()]
        if sandboxes:
            self.ctr("sandboxes", "rm", "--force", *sandboxes)
        return bool(containers or sandboxes)

    def load_system_images(self) -> None:
        """The cluster's own; cheap when they are in already."""
        for loaded in self.load(self.cluster.bin / "system-images"):
            assert loaded.name.startswith(SYSTEM_REGISTRY), f"{loaded.name} is no system image"

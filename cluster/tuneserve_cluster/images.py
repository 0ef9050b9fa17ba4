"""The three images that a cluster cannot do without, made from files alone: no builder, no registry.

An image is a tar (its layer), a JSON (its configuration) and a JSON that names
both (its manifest), each stored under its own digest: an OCI layout.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneserve_cluster.errors import run
from tuneserve_cluster.packages import program
from tuneserve_cluster.settings import BUSYBOX_IMAGE, COREDNS_IMAGE, PAUSE_IMAGE

OCI = "application/vnd.oci.image"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass
class Layer:
    """A tar whose bytes depend on its content only: the same files give the same digest."""

    buffer: io.BytesIO = field(default_factory=io.BytesIO)

    def __post_init__(self) -> None:
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)

    def folder(self, name: str, mode: int = 0o755) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, mode
        self.tar.addfile(entry)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), mode
        self.tar.addfile(entry, io.BytesIO(content))

    def link(self, name: str, target: str) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self.tar.addfile(entry)

    def bytes(self) -> bytes:
        self.tar.close()
        return self.buffer.getvalue()


class Layout:
    """An OCI layout in a folder; blobs that several images share are stored once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifests: list[dict[str, Any]] = []
        (folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)

    def blob(self, content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / "sha256" / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def image(self, name: str, layers: list[bytes], **config: Any) -> None:
        """Adds an image of these layers (tars), lowest first."""
        described = [self.blob(layer, f"{OCI}.layer.v1.tar") for layer in layers]
        configuration = {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], **config},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in described]},
        }
        manifest_type = f"{OCI}.manifest.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": self.blob(json.dumps(configuration, sort_keys=True).encode(), f"{OCI}.config.v1+json"),
            "layers": described,
        }
        descriptor = self.blob(json.dumps(manifest, sort_keys=True).encode(), manifest_type)
        descriptor["annotations"] = {"io.containerd.image.name": name}
        self.manifests.append(descriptor)

    def close(self) -> None:
        """Writes the index; without it the folder is no layout."""
        index = {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": self.manifests}
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (self.folder / "index.json").write_text(json.dumps(index))


def write_system_images(binaries: Path, target: Path) -> None:
    """pause (every pod's sandbox), coredns, and busybox (it makes and removes volumes)."""
    layout = Layout(target)
    pause = Layer()
    pause.file("pause", (binaries / "pause").read_bytes(), 0o755)
    layout.image(PAUSE_IMAGE, [pause.bytes()], Entrypoint=["/pause"], User="65535:65535")

    coredns = Layer()
    coredns.file("coredns", (binaries / "coredns").read_bytes(), 0o755)
    layout.image(COREDNS_IMAGE, [coredns.bytes()], Entrypoint=["/coredns"])

    busybox = Layer()
    for folder in ("bin", "etc", "root", "var"):
        busybox.folder(folder)
    busybox.folder("tmp", 0o1777)
    busybox.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    busybox.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    executable = program("busybox")
    busybox.file("bin/busybox", executable.read_bytes(), 0o755)
    for applet in run([executable, "--list"], "busybox does not run").split():
        if applet != "busybox":
            busybox.link(f"bin/{applet}", "busybox")
    layout.image(BUSYBOX_IMAGE, [busybox.bytes()], Cmd=["sh"])
    layout.close()

"""The OCI layout into which all images go: one folder, in which a layer that two images share lies once.

The index is written here and not by the builder: only so can it be replaced in one step, and carry the names by which
containerd knows the images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"


def full_name(reference: str) -> str:
    """`tuneserve/trainer:1` as containerd stores it."""
    return f"docker.io/{reference}"


def repository(name: str) -> str:
    """An image's name without its tag."""
    return name.rpartition(":")[0]


def with_image(entries: Iterable[Mapping[str, Any]], *, reference: str, entry: Mapping[str, Any]) -> list[Any]:
    """The index after an image is added: older tags of the same repository leave."""
    name = full_name(reference)
    others = [old for old in entries if repository(_name(old)) != repository(name)]
    return [*others, {**entry, "annotations": {REF_NAME: name, CONTAINERD_NAME: name}}]


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("annotations", {}).get(REF_NAME, ""))


class Layout:
    """A folder in the OCI image layout format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs" / "sha256"

    @property
    def entries(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads((self.folder / "index.json").read_text())["manifests"])
        except FileNotFoundError:
            return []

    def has(self, reference: str) -> bool:
        """Whether the image is there with all its blobs."""
        found = [entry for entry in self.entries if _name(entry) == full_name(reference)]
        return bool(found) and all(self._blob(digest).exists() for digest in self._reachable(found))

    def scratch(self, folder: Path) -> Layout:
        """An empty layout over the same blobs, for one build to write its index into."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True)
        (folder / "blobs").symlink_to(self.folder / "blobs")
        return Layout(folder)

    def add(self, reference: str, *, built: Layout) -> None:
        """Take over the one image of a scratch layout."""
        (entry,) = built.entries
        self._write(with_image(self.entries, reference=reference, entry=entry))

    def prune(self) -> int:
        """Remove what no image needs; returns the bytes that this freed."""
        if not self.blobs.is_dir():
            return 0
        wanted = {self._blob(digest) for digest in self._reachable(self.entries)}
        freed = 0
        for file in self.blobs.parent.rglob("*"):
            if file.is_file() and file not in wanted:
                freed += file.stat().st_size
                file.unlink()
        for file in self.folder.glob("oci-put-blob*"):
            file.unlink()
        return freed

    def _reachable(self, entries: Iterable[Mapping[str, Any]]) -> set[str]:
        digests = set()
        for entry in entries:
            digests.add(entry["digest"])
            try:
                manifest = json.loads(self._blob(entry["digest"]).read_text())
            except FileNotFoundError:
                continue
            digests |= {manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])}
        return digests

    def _blob(self, digest: str) -> Path:
        return self.blobs / digest.removeprefix("sha256:")

    def _write(self, entries: list[Any]) -> None:
        (self.folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        fresh = self.folder / "index.json.new"
        fresh.write_text(json.dumps({"schemaVersion": 2, "manifests": entries}, indent=1))
        os.replace(fresh, self.folder / "index.json")

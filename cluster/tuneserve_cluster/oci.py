"""OCI layouts and archives as files: which images they hold, and which blobs each needs.

Pure but for reading the files, so that what is streamed into a cluster can be
decided (and tested) without one.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from tuneserve_cluster.errors import ClusterError

NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
DEFAULT_REGISTRY = "docker.io"


def normalise(name: str) -> str:
    """The name that the kubelet looks for: `tuneserve/operator:a` is docker.io/tuneserve/operator:a.

    The rule is that of Docker references: the first part is a registry only if it
    looks like a host, a name of one part is in `library/`, and no tag means `latest`.
    """
    rest, at, digest = name.partition("@")
    first, slash, _ = rest.partition("/")
    if not slash:
        rest = f"{DEFAULT_REGISTRY}/library/{rest}"
    elif not ("." in first or ":" in first or first == "localhost"):
        rest = f"{DEFAULT_REGISTRY}/{rest}"
    if at:
        return f"{rest}@{digest}"
    return rest if ":" in rest.rpartition("/")[2] else f"{rest}:latest"


def image_name(descriptor: dict[str, Any]) -> str:
    """The full name that a descriptor's annotations give; a tag alone (as some builders write) is not one."""
    annotations = descriptor.get("annotations") or {}
    for key in NAME_ANNOTATIONS:
        name = str(annotations.get(key, ""))
        if re.search(r"[:/]", name):
            return normalise(name)
    raise ClusterError(
        f"the image {descriptor.get('digest')} has no full name: annotate it in index.json "
        f"with {NAME_ANNOTATIONS[0]} (such as tuneserve/operator:1)"
    )


class Source(Protocol):
    """Files by their path in an OCI layout."""

    def read(self, path: str) -> bytes: ...

    def size(self, path: str) -> int: ...

    def open(self, path: str) -> IO[bytes]: ...


class Folder:
    """A layout in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def size(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def open(self, path: str) -> IO[bytes]:
        return (self.root / path).open("rb")


class Archive:
    """A layout in a tar (an oci-archive)."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar
        self.members = {member.name.removeprefix("./"): member for member in tar if member.isfile()}

    def read(self, path: str) -> bytes:
        with self.open(path) as file:
            return file.read()

    def size(self, path: str) -> int:
        return self._member(path).size

    def open(self, path: str) -> IO[bytes]:
        file = self.tar.extractfile(self._member(path))
        assert file is not None, f"{path} is a file of the archive"
        return file

    def _member(self, path: str) -> tarfile.TarInfo:
        try:
            return self.members[path]
        except KeyError:
            raise FileNotFoundError(path) from None


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """The layout at a path, whichever form it has."""
    if path.is_dir():
        if not (path / "index.json").exists():
            raise ClusterError(f"{path} is no OCI layout: it has no index.json")
        yield Folder(path)
    elif path.is_file():
        try:
            with tarfile.open(path, "r:*") as tar:
                source = Archive(tar)
                if "index.json" not in source.members:
                    raise ClusterError(
                        f"{path} is no OCI archive: it has no index.json (docker-archives are not taken)"
                    )
                yield source
        except tarfile.TarError as error:
            raise ClusterError(f"{path} is no tar archive: {error}") from None
    else:
        raise ClusterError(f"{path} does not exist")


def blob_path(digest: str) -> str:
    algorithm, _, value = digest.partition(":")
    return f"blobs/{algorithm}/{value}"


@dataclass(frozen=True)
class Image:
    """An image of a layout: its full name, and the digests that it consists of, itself first."""

    name: str
    descriptor: dict[str, Any]
    blobs: tuple[str, ...]

    @property
    def digest(self) -> str:
        return str(self.descriptor["digest"])


def images(source: Source) -> list[Image]:
    """All images of a layout."""
    index = json.loads(source.read("index.json"))
    return [
        Image(image_name(each), each, tuple(dict.fromkeys(_walk(source, each)))) for each in index.get("manifests", [])
    ]


def _walk(source: Source, descriptor: dict[str, Any]) -> Iterator[str]:
    yield descriptor["digest"]
    if "manifest" not in descriptor["mediaType"] and "index" not in descriptor["mediaType"]:
        return
    document = json.loads(source.read(blob_path(descriptor["digest"])))
    for child in (document.get("config"), *document.get("layers", []), *document.get("manifests", [])):
        if child is not None:
            yield from _walk(source, child)


def is_new(image: Image, present: dict[str, str]) -> bool:
    """`present`: the store's images, name -> digest."""
    return present.get(image.name) != image.digest


def missing_blobs(wanted: list[Image], have: Collection[str]) -> list[str]:
    """Digests of these images that the store does not hold; each once."""
    return [digest for digest in dict.fromkeys(d for image in wanted for d in image.blobs) if digest not in have]


def write_tar(output: IO[bytes], source: Source, wanted: list[Image], blobs: list[str]) -> None:
    """A layout of these images with these blobs only, names written out in full."""
    manifests = []
    for image in wanted:
        annotations = {**(image.descriptor.get("annotations") or {}), NAME_ANNOTATIONS[0]: image.name}
        manifests.append({**image.descriptor, "annotations": annotations})
    index = json.dumps({"schemaVersion": 2, "manifests": manifests}).encode()
    with tarfile.open(fileobj=output, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        for name, content in (("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'), ("index.json", index)):
            _add(tar, name, len(content), io.BytesIO(content))
        for digest in blobs:
            path = blob_path(digest)
            with source.open(path) as file:
                _add(tar, path, source.size(path), file)


def _add(tar: tarfile.TarFile, name: str, size: int, content: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    tar.addfile(entry, content)

"""Finds the data files that the spec names: on claims, in ConfigMaps, at the hub, at an address."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tuneserve_pipeline import download
from tuneserve_pipeline.contract import ClaimFile, ConfigMapFile, DataSource, HttpFile, HubDataset
from tuneserve_pipeline.errors import InvalidData, Unavailable
from tuneserve_pipeline.files import DataFile
from tuneserve_pipeline.hub import Hub


def find_files(
    sources: Sequence[DataSource], *, split: str, datasets: Path, downloads: Path, hub: Callable[[], Hub]
) -> list[DataFile]:
    """The files of one split, in the order of the spec.

    `datasets` is where claims and ConfigMaps are mounted; `downloads` takes what comes from a hub.
    """
    found: list[DataFile] = []
    for index, source in enumerate(sources):
        field = f"spec.dataset.{split}[{index}]"
        place = f"{split}-{index}"
        if isinstance(source, ClaimFile):
            files = [_claim_file(source, datasets=datasets, field=field)]
        elif isinstance(source, ConfigMapFile):
            files = [_config_map_file(source, directory=datasets / place, field=field)]
        elif isinstance(source, HttpFile):
            files = [_http_file(source, directory=downloads / place, field=field)]
        else:
            files = _hub_files(source, directory=downloads / place, field=field, hub=hub())
        found += [replace(file, source=index, limit=source.limit, weight=source.weight) for file in files]
    return found


def _claim_file(source: ClaimFile, *, datasets: Path, field: str) -> DataFile:
    name = f"claim {source.claim}: {source.path}"
    root = (datasets / source.claim).resolve()
    path = (root / source.path.lstrip("/")).resolve()
    # A link may lead about within the claim, but not out of it to what else the pod can see.
    if not path.is_relative_to(root):
        raise InvalidData(reason="DatasetNotFound", message=f"{name}: leads out of the claim; correct {field}")
    if path.is_dir():
        raise InvalidData(
            reason="DatasetNotFound",
            message=f"{name}: is a directory ({_listing(path)}); name one file in {field}",
        )
    if not path.is_file():
        near = path.parent if path.parent.is_dir() else root
        where = near.relative_to(root).as_posix() if near.is_relative_to(root) else "."
        place = "the claim" if where == "." else where
        there = _listing(near) if near.is_dir() else "nothing"
        raise InvalidData(
            reason="DatasetNotFound",
            message=f"{name}: there is no such file; {place} holds: {there}. Correct {field}, or copy it there",
        )
    return DataFile(path=path, name=name, format=source.format)


def _config_map_file(source: ConfigMapFile, *, directory: Path, field: str) -> DataFile:
    name = f"ConfigMap {source.name}: {source.key}"
    path = directory / source.key
    if not path.is_file():
        there = _listing(directory) if directory.is_dir() else "nothing"
        raise InvalidData(
            reason="DatasetNotFound", message=f"{name}: there is no such key; it holds: {there}. Correct {field}"
        )
    # The hash of this stage covers the content, so another content must not become its output.
    if hashlib.sha256(path.read_bytes()).hexdigest() != source.digest:
        raise Unavailable(
            reason="DatasetChanged",
            message=f"{name}: was edited while the stage started; it runs again with the new content",
        )
    return DataFile(path=path, name=name, format=source.format)


def _hub_files(source: HubDataset, *, directory: Path, field: str, hub: Hub) -> list[DataFile]:
    name = f"{field}.huggingFace {source.repo}@{source.revision}"
    paths, commit = hub.fetch_dataset(source, directory=directory, name=name)
    return [
        DataFile(path=path, name=f"{source.repo}@{commit[:12]}: {path.relative_to(directory).as_posix()}")
        for path in paths
    ]


def _http_file(source: HttpFile, *, directory: Path, field: str) -> DataFile:
    # Without what may stand behind the path: keys and signatures are for no message and no log.
    parts = urlsplit(source.url)
    name = f"{parts.hostname}{unquote(parts.path)}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (PurePosixPath(unquote(parts.path)).name or "data")
    download.fetch(source.url, sha256=source.sha256, path=path, name=f"{field}.http {name}")
    return DataFile(path=path, name=name, format=source.format)


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    return ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])]) or "nothing"

"""Which files of a data set's repository hold a subset and a split. Pure.

Follows what the hub documents: the `configs` in the card's metadata, else the names of files and directories.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

from tuneserve_pipeline.files import data_extension

_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def select_files(names: Iterable[str], *, card: Mapping[str, Any], subset: str, split: str) -> list[str]:
    """Data files of one split, sorted; empty if the repository has none for it."""
    files = sorted(name for name in names if data_extension(name) is not None)
    configured = _configured(card, subset)
    if configured is not None:
        patterns = _patterns(configured, split)
        root = str(configured.get("data_dir", "")).strip("/")
        if patterns:
            wanted = [f"{root}/{pattern}" if root else pattern for pattern in patterns]
            return [name for name in files if any(fnmatch(name, pattern) for pattern in wanted)]
        files = [name for name in files if not root or name.startswith(root + "/")]
    elif subset != "default":
        files = [name for name in files if subset in re.split(r"[/.]", name)]
    return _by_name(files, split)


def _configured(card: Mapping[str, Any], subset: str) -> Mapping[str, Any] | None:
    configs = [config for config in card.get("configs") or [] if isinstance(config, Mapping)]
    for config in configs:
        if config.get("config_name", "default") == subset:
            return config
    if subset == "default" and configs:
        marked = [config for config in configs if config.get("default")]
        return marked[0] if marked else configs[0] if len(configs) == 1 else None
    return None


def _patterns(config: Mapping[str, Any], split: str) -> list[str]:
    """`data_files` comes as one path, a list of paths (both: train), or a list of {split, path}."""
    given = config.get("data_files")
    entries: Sequence[Any] = given if isinstance(given, list) else [given] if given else []
    patterns: list[str] = []
    for entry in entries:
        if isinstance(entry, Mapping):
            paths = entry.get("path") if entry.get("split", "train") == split else None
        else:
            paths = entry if split == "train" else None
        patterns += [paths] if isinstance(paths, str) else [str(path) for path in paths or []]
    return patterns


def _by_name(files: Sequence[str], split: str) -> list[str]:
    found = [name for name in files if _split_of(name) == split]
    # A repository that names no split at all is one training set.
    return found or (list(files) if split == "train" and not any(map(_split_of, files)) else [])


def _split_of(name: str) -> str | None:
    """The split that a path names: its file first, then its directories from the inside out."""
    for part in reversed(name.lower().split("/")):
        words = set(re.split(r"[^a-z]+", part))
        for split, aliases in _ALIASES.items():
            if words.intersection(aliases):
                return split
    return None

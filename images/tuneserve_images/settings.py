"""Where everything lies: the repository, and one cache folder outside it.

images/oci/       the layout that a cluster loads
images/build/     the builder's own store, logs, and what is half done
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Folders:
    """The folders of one cache."""

    cache: Path

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Folders:
        """TUNESERVE_CACHE, or `tuneserve` in the user's cache folder."""
        if own := environment.get("TUNESERVE_CACHE"):
            return cls(Path(own).expanduser().resolve())
        base = environment.get("XDG_CACHE_HOME") or "~/.cache"
        return cls(Path(base).expanduser().resolve() / "tuneserve")

    @property
    def layout(self) -> Path:
        return self.cache / "images" / "oci"

    @property
    def build(self) -> Path:
        return self.cache / "images" / "build"

    @property
    def scratch(self) -> Path:
        """Emptied by every build."""
        return self.build / "scratch"

    @property
    def lock(self) -> Path:
        return self.build / "lock"

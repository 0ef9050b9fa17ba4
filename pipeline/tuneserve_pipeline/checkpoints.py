"""Checkpoints that are whole or not there: written aside, sealed by a manifest of sizes and hashes, then renamed.

The library's own marks are not enough: its periodic checkpoints carry none, and it resumes from half of one.
Must import no torch.
"""

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tuneserve_pipeline import output
from tuneserve_pipeline.contract import OutputFile

log = logging.getLogger(__name__)

SEAL = "checkpoint.json"
#: Where the trainer writes; nothing in it counts.
ASIDE = "writing"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    path: Path
    step: int


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The checkpoints of one run below `directory`; one process at a time."""

    directory: Path
    keep: int
    """Complete checkpoints that stay; at least one does."""

    @property
    def aside(self) -> Path:
        """Where a checkpoint is written before `seal`."""
        return self.directory / ASIDE

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint. Removes what a crash left behind, and every one that is damaged."""
        shutil.rmtree(self.aside, ignore_errors=True)
        for found in self._sorted():
            problem = damage(found.path)
            if problem is None:
                return found
            log.warning("the checkpoint of step %d is left out and removed: %s", found.step, problem)
            shutil.rmtree(found.path)
        return None

    def steps(self) -> list[int]:
        """Of all checkpoints that carry a final name, newest first; whether they are whole is not looked at."""
        return [checkpoint.step for checkpoint in self._sorted()]

    def at(self, step: int) -> Checkpoint | None:
        """The checkpoint of `step`, if it is there and whole."""
        found = next((checkpoint for checkpoint in self._sorted() if checkpoint.step == step), None)
        return found if found is not None and damage(found.path) is None else None

    def seal(self, written: Path, *, step: int, spare: int | None = None) -> Checkpoint:
        """Make what was written at `written` (on the same volume) the checkpoint of `step`, and let old ones go, but
        for that of the step `spare`."""
        output.sync_tree(written)
        files = [file.model_dump() for file in output.digest_files(written)]
        output.write_text(written / SEAL, json.dumps({"step": step, "files": files}, indent=1) + "\n")
        final = self.directory / f"step-{step}"
        if final.exists():  # the same step again: a run that resumed from before it
            shutil.rmtree(final)
        written.rename(final)
        output.sync(self.directory)
        for old in self._sorted()[max(1, self.keep) :]:
            if old.step != spare:
                shutil.rmtree(old.path)
        return Checkpoint(path=final, step=step)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _sorted(self) -> list[Checkpoint]:
        """All that carry a final name, newest first."""
        if not self.directory.is_dir():
            return []
        named = [(path, _NAME.fullmatch(path.name)) for path in self.directory.iterdir()]
        found = [Checkpoint(path=path, step=int(match[1])) for path, match in named if match]
        return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was sealed."""
    try:
        listed = [OutputFile.model_validate(file) for file in json.loads((path / SEAL).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{SEAL} cannot be read ({error})"
    for file in listed:
        found = path / file.path
        if not found.is_file():
            return f"{file.path} is missing"
        if found.stat().st_size != file.size:
            return f"{file.path} has {found.stat().st_size} bytes, expected {file.size}"
        if output.digest_file(found) != file.sha256:
            return f"the content of {file.path} is not what was written"
    return None

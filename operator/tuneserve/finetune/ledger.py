"""What has been finished, kept as annotations on the artifacts claim, so that it outlives the FineTune.

An entry that is lost costs a second, never a training: the stage runs again and finds its finished output.
Pure: it reads a claim and says what to change.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import ValidationError

from tuneserve import names
from tuneserve_pipeline.contract import Outcome

#: When the outcome of the same key was recorded (RFC 3339): the oldest entries make room for new ones.
FINISHED_PREFIX = "finished.tuneserve.dev/"
#: Bytes of all annotations of the claim together; the API server allows 256 KiB.
LIMIT = 200 * 1024


class StageRun(NamedTuple):
    """A stage with the hash of its inputs: the same pair always stands for the same output."""

    stage: str
    hash: str

    def __str__(self) -> str:
        return f"{self.stage}.{self.hash}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    outcome: Outcome
    finished: datetime | None = None
    """None when the annotation that tells it is gone."""


@dataclass(frozen=True)
class Ledger:
    """Finished runs and their outcomes."""

    entries: Mapping[StageRun, Entry] = field(default_factory=dict)

    def outcome(self, run: StageRun) -> Outcome | None:
        entry = self.entries.get(run)
        return entry.outcome if entry else None

    def finished(self, run: StageRun) -> datetime | None:
        entry = self.entries.get(run)
        return entry.finished if entry else None

    def with_entries(self, entries: Mapping[StageRun, Entry]) -> "Ledger":
        return Ledger({**self.entries, **entries})


def is_finished(outcome: Outcome) -> bool:
    """Whether the outcome tells of an output, and not of a failure."""
    return outcome.error is None and bool(outcome.digest)


def read(claim: Mapping[str, Any] | None) -> Ledger:
    """The ledger of an artifacts claim. What cannot be read counts as missing, and so is made again by the stage."""
    annotations = _annotations(claim)
    entries: dict[StageRun, Entry] = {}
    for key, value in annotations.items():
        if not key.startswith(names.OUTCOME_PREFIX):
            continue
        stage, _, hash = key.removeprefix(names.OUTCOME_PREFIX).rpartition(".")
        try:
            outcome = Outcome.model_validate_json(value)
        except ValidationError:
            continue
        if (outcome.stage, outcome.hash) == (stage, hash) and is_finished(outcome):
            run = StageRun(stage, hash)
            entries[run] = Entry(outcome=outcome, finished=_time(annotations.get(f"{FINISHED_PREFIX}{run}")))
    return Ledger(entries)


def recording(claim: Mapping[str, Any], entries: Mapping[StageRun, Entry], *, limit: int = LIMIT) -> dict[str, Any]:
    """Changes of the claim's annotations that record the entries; None as a value removes.

    The oldest recorded outcomes go when all annotations together would exceed `limit` bytes.
    """
    changes: dict[str, Any] = {}
    for run, entry in entries.items():
        changes[f"{names.OUTCOME_PREFIX}{run}"] = entry.outcome.model_dump_json(exclude_defaults=True)
        if entry.finished is not None:
            changes[f"{FINISHED_PREFIX}{run}"] = _text(entry.finished)
    after = {**_annotations(claim), **changes}
    excess = sum(len(key.encode()) + len(value.encode()) for key, value in after.items()) - limit
    recorded = [key.removeprefix(names.OUTCOME_PREFIX) for key in after if key.startswith(names.OUTCOME_PREFIX)]
    # RFC 3339 in UTC sorts as text; an entry without a time is older than all that have one.
    for name in sorted(recorded, key=lambda name: (after.get(f"{FINISHED_PREFIX}{name}", ""), name)):
        if excess <= 0:
            break
        if f"{names.OUTCOME_PREFIX}{name}" in changes:
            continue
        for key in (f"{names.OUTCOME_PREFIX}{name}", f"{FINISHED_PREFIX}{name}"):
            if key in after:
                excess -= len(key.encode()) + len(after[key].encode())
                changes[key] = None
    return changes


def _annotations(claim: Mapping[str, Any] | None) -> Mapping[str, str]:
    return ((claim or {}).get("metadata") or {}).get("annotations") or {}


def _text(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(text: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        return None

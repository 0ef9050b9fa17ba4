"""The ledger on the artifacts claim: what is read back is what was recorded, and it never grows too large."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneserve.finetune.ledger import Entry, StageRun, read, recording
from tuneserve_pipeline.contract import Outcome, StageError

MONDAY = datetime(2026, 1, 5, 12, tzinfo=UTC)


def entry(run: StageRun, *, finished: datetime | None = MONDAY, text: str = "x") -> Entry:
    outcome = Outcome(stage=run.stage, hash=run.hash, digest="sha256:1", metrics={"loss": 0.5}, facts={"fact": text})
    return Entry(outcome=outcome, finished=finished)


def claim(annotations: dict[str, str]) -> dict[str, object]:
    return {"metadata": {"annotations": annotations}}


def apply(annotations: dict[str, str], changes: dict[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in {**annotations, **changes}.items() if value is not None}


def size(annotations: dict[str, str]) -> int:
    return sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())


def test_what_is_recorded_is_read_back() -> None:
    runs = [StageRun("evaluate-merged", "a" * 16), StageRun("train", "b" * 16)]
    entries = {run: entry(run) for run in runs}
    annotations = apply({"other": "stays"}, recording(claim({"other": "stays"}), entries))
    assert annotations["other"] == "stays"
    assert read(claim(annotations)).entries == entries
    assert read(None).entries == {}


@pytest.mark.parametrize(
    "value",
    [
        "no JSON",
        "{}",
        Outcome(stage="train", hash="other", digest="sha256:1").model_dump_json(),
        Outcome(stage="train", hash="h").model_dump_json(),
        Outcome(
            stage="train", hash="h", digest="sha256:1", error=StageError(reason="Bad", message="")
        ).model_dump_json(),
        '{"stage": "train", "hash": "h", "digest": "sha256:1", "field": "of a newer version"}',
    ],
)
def test_what_tells_of_no_output_counts_as_missing(value: str) -> None:
    assert read(claim({"outcome.tuneserve.dev/train.h": value})).entries == {}


def test_the_oldest_make_room() -> None:
    annotations: dict[str, str] = {}
    for number in range(40):
        run = StageRun("train", f"{number:016x}")
        one = entry(run, finished=MONDAY + timedelta(hours=number), text="x" * 200)
        annotations = apply(annotations, recording(claim(annotations), {run: one}, limit=4000))
        assert size(annotations) <= 4000
    kept = sorted(int(run.hash, 16) for run in read(claim(annotations)).entries)
    assert kept == list(range(40 - len(kept), 40)) and len(kept) >= 5


@given(
    st.lists(
        st.tuples(st.sampled_from(["prepare", "train"]), st.integers(0, 50), st.integers(0, 400), st.booleans()),
        max_size=60,
    )
)
def test_whatever_is_recorded_last_is_there_and_the_limit_holds(steps: list[tuple[str, int, int, bool]]) -> None:
    annotations: dict[str, str] = {"foreign": "é" * 100}
    for stage, number, length, has_time in steps:
        run = StageRun(stage, f"{number:016x}")
        one = entry(run, finished=MONDAY + timedelta(minutes=number) if has_time else None, text="é" * length)
        annotations = apply(annotations, recording(claim(annotations), {run: one}, limit=3000))
        assert read(claim(annotations)).outcome(run) == one.outcome
        assert size(annotations) <= 3000
        times = {key.partition("/")[2] for key in annotations if key.startswith("finished.")}
        assert times <= {str(run) for run in read(claim(annotations)).entries}, "a time without its outcome"

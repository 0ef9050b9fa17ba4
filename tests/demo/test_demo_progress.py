"""What the demo prints of an object's status."""

import io
from typing import Any

from tuneserve_demo.progress import ProgressLine, bar, describe, ended
from tuneserve_demo.tools import condition, is_ready, minutes


def finetune(*stages: dict[str, Any], **progress: Any) -> dict[str, Any]:
    return {"metadata": {"generation": 1}, "status": {"stages": list(stages), "progress": progress}}


PREPARED = {
    "name": "prepare",
    "state": "Succeeded",
    "job": "sentiment-prepare-0123456789",
    "startTime": "2030-01-01T00:00:00Z",
    "completionTime": "2030-01-01T00:01:15Z",
}
TRAINING = {"name": "train", "state": "Running"}
MERGE = {"name": "merge", "state": "Pending"}


def test_a_running_stage_is_one_line_with_all_that_is_known() -> None:
    line = describe(
        finetune(
            PREPARED, TRAINING, MERGE, stage="train", percent=42, step=84, totalSteps=200, loss="0.3121", etaSeconds=125
        )
    )
    for part in ("train", "42 %", "step 84/200", "loss 0.312", "2 min 05 s left"):
        assert part in line
    assert "\n" not in line


def test_what_is_not_known_is_left_out() -> None:
    assert describe(finetune(PREPARED, TRAINING, MERGE)).split() == ["train"]
    assert describe(finetune(PREPARED, MERGE)) == "waiting for merge"
    assert describe({"metadata": {"generation": 1}}) == ""


def test_a_server_tells_what_it_waits_for() -> None:
    waiting = {"type": "Reconciling", "status": "True", "observedGeneration": 3, "message": "the server loads"}
    found = {"metadata": {"generation": 3}, "status": {"conditions": [waiting]}}
    assert describe(found) == "the server loads"


def test_a_finished_stage_says_how_long_it_took_and_a_found_one_that_it_was_found() -> None:
    found = {"name": "merge", "state": "Succeeded"}
    failed = {"name": "train", "state": "Failed", "message": "tweets.jsonl:17 is not valid JSON"}
    lines = ended(finetune(PREPARED, found, failed, {"name": "evaluate-base", "state": "Running"}))
    assert lines["prepare"].endswith("done in 1 min 15 s")
    assert lines["merge"].endswith("done before, found again")
    assert lines["train"].endswith("failed: tweets.jsonl:17 is not valid JSON")
    assert set(lines) == {"prepare", "merge", "train"}


def test_without_a_terminal_news_of_one_stage_comes_now_and_then() -> None:
    stream, now = io.StringIO(), 0.0
    line = ProgressLine(stream=stream, terminal=False, clock=lambda: now)
    for second in range(41):
        now = float(second)
        line.show(finetune(PREPARED, TRAINING, stage="train", percent=second))
    line.show(finetune(PREPARED, {**TRAINING, "state": "Succeeded"}, {"name": "merge", "state": "Running"}))
    line.close()
    lines = stream.getvalue().splitlines()
    assert [each.split()[0] for each in lines] == ["prepare", "train", "train", "train", "train", "merge"]
    assert [" 0 %" in lines[1], "20 %" in lines[2], "40 %" in lines[3], "done" in lines[4]] == [True] * 4
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_one_line_changes_and_what_ended_stays() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream=stream, terminal=True)
    line.show(finetune(TRAINING, stage="train", percent=10))
    line.show(finetune(PREPARED, TRAINING, stage="train", percent=20))
    line.close()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().endswith("\r\033[K")


def test_a_bar_never_leaves_its_frame() -> None:
    assert {len(bar(percent)) for percent in (0, 1, 50, 99, 100, 120)} == {20}
    assert bar(0).count("█") == 0 and bar(100).count("█") == 20


def test_a_condition_about_an_older_spec_does_not_count() -> None:
    ready = {"type": "Ready", "status": "True", "observedGeneration": 1}
    found = {"metadata": {"generation": 2}, "status": {"conditions": [ready]}}
    assert condition(found, "Ready") == {} and not is_ready(found)
    found["metadata"]["generation"] = 1
    assert is_ready(found)


def test_durations_read_well() -> None:
    assert [minutes(4.6), minutes(60), minutes(601.4)] == ["5 s", "1 min 00 s", "10 min 01 s"]

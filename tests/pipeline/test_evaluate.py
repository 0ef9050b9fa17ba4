"""`evaluate` on the tiny model: real generation, real scores."""

from support.stages import Finished, Workspace
from tuneserve_pipeline.contract import EvaluateSpec, EvaluationTarget


def test_the_base_model_is_measured_on_every_test_row(prepared: tuple[Workspace, Finished]) -> None:
    workspace, prepare = prepared
    config = workspace.config(
        EvaluateSpec(target=EvaluationTarget.BASE), name="evaluate-base", parents={"prepare": prepare}
    )
    finished = workspace.run(config)
    assert finished.code == 0, finished.log
    rows = finished.rows("predictions.jsonl")
    assert len(rows) == int(prepare.outcome.facts["testRows"])
    assert finished.outcome.metrics["samples"] == len(rows)
    right = sum(row["label"] == row["expected"] for row in rows)
    assert finished.outcome.metrics["accuracy"] == right / len(rows)
    invalid = sum(row["label"] is None for row in rows)
    assert finished.outcome.metrics["invalidRatio"] == invalid / len(rows)
    assert len(finished.json("samples.json")) == 10

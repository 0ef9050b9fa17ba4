"""How the operator reads live objects and writes their status."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from api.manifests import FINETUNE, MODELSERVE, REMOVED, changed
from tuneserve.api import (
    Artifact,
    Condition,
    ConditionStatus,
    FineTune,
    FineTuneStatus,
    Metric,
    ModelServe,
    StageState,
    StageStatus,
    Verdict,
)
from tuneserve.api.structural import structural_schema

NOW = datetime(2026, 11, 22, 8, 30, 15, 999_999, tzinfo=UTC)


def test_a_live_object_is_read_with_what_it_leaves_out() -> None:
    finetune = FineTune.model_validate(FINETUNE)
    assert finetune.spec.base_model.claim is not None
    assert (finetune.spec.base_model.claim.name, finetune.spec.base_model.claim.path) == ("base-model", "")
    assert finetune.spec.task.classification is not None
    assert finetune.spec.task.classification.labels == ("negative", "positive")
    assert [(export.name, export.format) for export in finetune.spec.exports] == [("merged", "Merged")]
    assert finetune.status == FineTuneStatus()


def test_fields_of_a_newer_version_are_no_obstacle() -> None:
    newer = changed(
        FINETUNE, {"spec.tracking": {"mlflow": {}}, "status": {"history": [1]}, "metadata.managedFields": []}
    )
    assert FineTune.model_validate(newer).spec == FineTune.model_validate(FINETUNE).spec


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"spec.baseModel": {}}, ("spec", "baseModel")),
        ({"spec.task": REMOVED}, ("spec", "task")),
        ({"spec.training": {"learningRate": "fast"}}, ("spec", "training", "learningRate")),
    ],
)
def test_a_bad_stored_object_is_told_by_its_place(changes: dict[str, object], place: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as refusal:
        FineTune.model_validate(changed(FINETUNE, changes))
    assert [error["loc"] for error in refusal.value.errors()] == [place]


def test_a_model_is_in_exactly_one_place() -> None:
    with pytest.raises(ValidationError, match="must set exactly one of fineTune and claim"):
        ModelServe.model_validate(changed(MODELSERVE, {"spec.model.claim": {"name": "models"}}))


def test_a_status_is_written_as_the_api_server_stores_it() -> None:
    status = FineTuneStatus(
        observed_generation=3,
        conditions=(
            Condition(
                type="Ready",
                status=ConditionStatus.TRUE,
                last_transition_time=NOW,
                reason="AllExported",
                message="Done.",
            ),
        ),
        stages=(
            StageStatus(name="train", hash="0123456789abcdef", state=StageState.RUNNING, attempt=1, start_time=NOW),
        ),
        artifacts=(
            Artifact(
                export="merged",
                version="0123456789abcdef",
                claim="reviews-artifacts",
                path="merge/0123456789abcdef/model",
                metrics=(Metric(name="accuracy", value="0.8125", base="0.5"),),
                verdict=Verdict.PASSED,
            ),
        ),
    )
    body = status.to_body()
    assert body == {
        "observedGeneration": 3,
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "lastTransitionTime": "2026-11-22T08:30:15Z",
                "reason": "AllExported",
                "message": "Done.",
            }
        ],
        "stages": [
            {
                "name": "train",
                "hash": "0123456789abcdef",
                "state": "Running",
                "attempt": 1,
                "startTime": "2026-11-22T08:30:15Z",
            }
        ],
        "artifacts": [
            {
                "export": "merged",
                "version": "0123456789abcdef",
                "claim": "reviews-artifacts",
                "path": "merge/0123456789abcdef/model",
                "metrics": [{"name": "accuracy", "value": "0.8125", "base": "0.5"}],
                "verdict": "Passed",
            }
        ],
    }
    assert FineTuneStatus.model_validate(body).to_body() == body


@given(st.text(min_size=1, max_size=20_000))
def test_a_message_of_any_length_can_be_written(message: str) -> None:
    written = StageStatus(name="prepare", state=StageState.FAILED, message=message).message
    assert written is not None
    assert len(written) <= 4096
    assert written == message or message.startswith(written.removesuffix("…"))


class Measured(BaseModel):
    """A model with a form that a CRD must not have."""

    value: float = Field(default=0.5, gt=0)


def test_a_form_that_a_crd_cannot_express_is_an_error() -> None:
    with pytest.raises(ValueError, match="a structural schema has no exclusiveMinimum"):
        structural_schema(Measured)

"""Which version is served, for every state a FineTune can be in."""

from datetime import UTC, datetime
from typing import Any

import pytest

from support.finetunes import finetune, modelserve
from tuneserve import conditions
from tuneserve.api import FineTune, ModelServe, ServedVersion
from tuneserve.modelserve.plan import Choice, choose, same_version, version_text

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CURRENT = ServedVersion(version="old", digest="sha256:old", claim="mood-artifacts", path="merge/old/model")
ELSEWHERE = ServedVersion(version="v", digest="sha256:v", claim="other-artifacts", path="merge/v/model")


def _artifact(**fields: Any) -> dict[str, Any]:
    return {
        "export": "merged",
        "version": "new",
        "claim": "mood-artifacts",
        "path": "merge/new/model",
        "digest": "sha256:new",
        "verdict": "Passed",
        **fields,
    }


def _tuning(*artifacts: dict[str, Any], status: dict[str, Any] | None = None, **spec: Any) -> FineTune:
    body = finetune("mood", **spec)
    body["status"] = {"artifacts": list(artifacts), **(status or {})}
    return FineTune.model_validate(body)


def _choose(
    tuning: FineTune | None, *, current: ServedVersion | None = None, export: str = "merged", version: str | None = None
) -> Choice:
    body = modelserve("y", finetune="mood", export=export)
    if version is not None:
        body["spec"]["model"]["fineTune"]["version"] = version
    return choose(ModelServe.model_validate(body).spec.model, finetune=tuning, current=current)


def test_an_artifact_that_passed_is_served() -> None:
    choice = _choose(_tuning(_artifact()), current=CURRENT)
    assert choice == Choice(
        version=ServedVersion(version="new", digest="sha256:new", claim="mood-artifacts", path="merge/new/model")
    )


@pytest.mark.parametrize(
    ("tuning", "reason", "stalled", "words"),
    [
        (None, "FineTuneNotFound", False, '"mood" does not exist'),
        (_tuning(), "FineTuneNotReady", False, 'no finished export "merged"'),
        (_tuning(_artifact(verdict="Pending")), "FineTuneNotReady", False, "no finished export"),
        (_tuning(_artifact(digest=None)), "FineTuneNotReady", False, "no finished export"),
        (_tuning(_artifact(export="other")), "FineTuneNotReady", False, "no finished export"),
        (
            _tuning(_artifact(verdict="Failed", reason="accuracy 0.61 must be at least 0.80")),
            "GatesNotPassed",
            True,
            "accuracy 0.61 must be at least 0.80",
        ),
    ],
)
class TestWithoutANewVersion:
    """The FineTune has nothing (better) to serve."""

    def test_nothing_is_served_and_the_cause_is_told(
        self, tuning: FineTune | None, reason: str, stalled: bool, words: str
    ) -> None:
        choice = _choose(tuning)
        assert choice.version is None and choice.problem is not None
        assert (choice.problem.reason, choice.problem.stalled) == (reason, stalled)
        assert words in choice.problem.message

    def test_a_version_of_before_goes_on_without_a_problem(
        self, tuning: FineTune | None, reason: str, stalled: bool, words: str
    ) -> None:
        choice = _choose(tuning, current=CURRENT)
        assert (choice.version, choice.problem) == (CURRENT, None)
        assert choice.note

    def test_another_model_goes_on_but_is_not_what_was_asked_for(
        self, tuning: FineTune | None, reason: str, stalled: bool, words: str
    ) -> None:
        choice = _choose(tuning, current=ELSEWHERE)
        assert choice.version == ELSEWHERE
        assert choice.problem is not None and choice.problem.reason == reason


def test_a_finetune_that_cannot_go_on_is_quoted() -> None:
    stalled = conditions.as_stalled((), reason="DataInvalid", message="line 7: no label", generation=1, now=NOW)
    tuning = _tuning(status={"conditions": [condition.to_body() for condition in stalled]})
    problem = _choose(tuning).problem
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("FineTuneStalled", True)
    assert "line 7: no label" in problem.message


def test_what_a_finetune_is_doing_is_quoted() -> None:
    doing = conditions.as_reconciling((), reason="Training", message="step 3 of 9", generation=1, now=NOW)
    tuning = _tuning(status={"conditions": [condition.to_body() for condition in doing]})
    problem = _choose(tuning).problem
    assert problem is not None and problem.message.endswith(": step 3 of 9")


@pytest.mark.parametrize("current", [None, CURRENT])
def test_an_export_that_does_not_exist(current: ServedVersion | None) -> None:
    choice = _choose(_tuning(_artifact()), export="awq", current=current)
    assert choice.version == current
    assert choice.problem is not None and choice.problem.reason == "ExportNotFound"
    assert choice.problem.message.endswith("one of: merged")


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ([], "add an export of format Merged to it"),
        ([{"name": "full", "format": "Merged"}], "serve one of: full"),
    ],
)
def test_an_adapter_is_not_served_alone(others: list[dict[str, str]], advice: str) -> None:
    tuning = _tuning(_artifact(export="lora"), exports=[{"name": "lora", "format": "Adapter"}, *others])
    problem = _choose(tuning, export="lora").problem
    assert problem is not None
    assert (problem.reason, problem.stalled) == ("ExportNotServable", True)
    assert problem.message.endswith(advice)


class TestAPinnedVersion:
    def test_is_served_when_it_is_there(self) -> None:
        choice = _choose(_tuning(_artifact()), version="new")
        assert choice.version is not None and choice.version.version == "new"

    def test_stays_when_there_is_a_newer_one(self) -> None:
        choice = _choose(_tuning(_artifact()), version="old", current=CURRENT)
        assert (choice.version, choice.problem) == (CURRENT, None)
        assert "new" in choice.note

    def test_that_is_not_there_is_told_with_the_one_that_is(self) -> None:
        choice = _choose(_tuning(_artifact()), version="older", current=CURRENT)
        assert choice.version == CURRENT, "what is served is not taken away"
        assert choice.problem is not None and choice.problem.reason == "VersionNotFound"
        assert "version new" in choice.problem.message


def test_a_model_on_a_claim() -> None:
    body = modelserve("y", finetune="unused")
    body["spec"]["model"] = {"claim": {"name": "models", "path": "llama"}}
    choice = choose(ModelServe.model_validate(body).spec.model, finetune=None, current=CURRENT)
    assert choice == Choice(version=ServedVersion(claim="models", path="llama"))
    assert choice.version is not None and version_text(choice.version) == "llama of claim models"


def test_the_time_is_no_part_of_a_version() -> None:
    assert same_version(CURRENT, CURRENT.model_copy(update={"since": NOW}))
    assert not same_version(CURRENT, ELSEWHERE)
    assert not same_version(CURRENT, None)
    assert same_version(None, None)

"""What a ModelServe says, from its first sight to a finished rollout."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from support.finetunes import modelserve
from tuneserve import conditions
from tuneserve.api import ModelServe, ModelServeStatus, ServedVersion
from tuneserve.modelserve.deployment import Rollout
from tuneserve.modelserve.plan import Choice, Problem
from tuneserve.modelserve.status import Observation, announcements, report, report_problem
from tuneserve.modelserve.trouble import Trouble

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
OLD = ServedVersion(version="old", digest="sha256:old", claim="c", path="merge/old/model")
NEW = ServedVersion(version="new", digest="sha256:new", claim="c", path="merge/new/model")

STARTING = Rollout(
    wanted=2,
    total=1,
    updated=1,
    ready=0,
    available=0,
    complete=False,
    overdue=False,
    refused=None,
    template="t",
)
COMPLETE = replace(STARTING, total=2, updated=2, ready=2, available=2, complete=True)
SURGING = replace(COMPLETE, total=3, updated=1, complete=False)
LOST_ONE = replace(COMPLETE, available=1, ready=1, complete=False)


def _modelserve(status: ModelServeStatus | None = None) -> ModelServe:
    body: dict[str, Any] = modelserve("mood", finetune="mood")
    body["metadata"] |= {"namespace": "team", "generation": 4}
    body["status"] = status.to_body() if status else {}
    return ModelServe.model_validate(body)


def _report(
    before: ModelServeStatus | None = None,
    *,
    version: ServedVersion | None = NEW,
    rollout: Rollout | None = COMPLETE,
    trouble: Trouble | None = None,
    problem: Problem | None = None,
    note: str = "",
    now: datetime = NOW,
) -> ModelServeStatus:
    choice = Choice(version=version, problem=problem, note=note)
    return report(_modelserve(before), Observation(choice=choice, rollout=rollout, trouble=trouble), now=now)


def _summary(status: ModelServeStatus) -> dict[str, tuple[str, str]]:
    return {condition.type: (str(condition.status), condition.reason) for condition in status.conditions}


def _message(status: ModelServeStatus, type: str) -> str:
    condition = conditions.find(status.conditions, type)
    assert condition is not None
    return condition.message


def test_first_sight_has_all_conditions() -> None:
    status = _report(version=None, rollout=None, problem=Problem(reason="FineTuneNotFound", message="m", stalled=False))
    assert _summary(status) == {
        "Ready": ("False", "FineTuneNotFound"),
        "Reconciling": ("True", "FineTuneNotFound"),
        "Stalled": ("False", "FineTuneNotFound"),
        "Available": ("False", "NotAnswering"),
    }
    assert status.observed_generation == 4
    assert (status.replicas, status.ready_replicas) == (0, 0)
    assert status.selector is not None and "tuneserve.dev/modelserve=mood" in status.selector
    assert status.url is None and status.served is None


def test_a_new_version_is_a_candidate_until_it_is_served_by_all() -> None:
    started = _report(rollout=STARTING)
    assert (started.served, started.candidate) == (None, NEW.model_copy(update={"since": NOW}))
    assert _summary(started)["Reconciling"] == ("True", "Starting")
    assert "version new is being loaded: 0 of 2 replicas answer" in _message(started, "Ready")

    done = _report(started, now=LATER)
    assert (done.served, done.candidate) == (NEW.model_copy(update={"since": LATER}), None)
    assert _summary(done) == {
        "Ready": ("True", "Serving"),
        "Reconciling": ("False", "Serving"),
        "Stalled": ("False", "Serving"),
        "Available": ("True", "Answering"),
    }
    assert _message(done, "Ready") == "version new is served by 2 replicas at http://mood.team.svc/v1"
    assert done.url == "http://mood.team.svc/v1"


def test_the_old_version_counts_as_served_during_a_rollout() -> None:
    before = _report(version=OLD)
    rolling = _report(before, rollout=SURGING, now=LATER)
    assert rolling.served == before.served
    assert rolling.candidate is not None and rolling.candidate.version == "new"
    assert _summary(rolling)["Ready"] == ("False", "RollingOut")
    assert _summary(rolling)["Available"] == ("True", "Answering")

    again = _report(rolling, rollout=SURGING, now=LATER + timedelta(hours=1))
    assert again == rolling, "nothing has changed, so nothing is written"

    back = _report(rolling, version=OLD, rollout=SURGING, now=LATER)
    assert (back.served, back.candidate) == (before.served, None), "an edit undone ends the candidate"


@pytest.mark.parametrize("rollout", [STARTING, COMPLETE, SURGING, LOST_ONE])
def test_the_same_observation_gives_the_same_status(rollout: Rollout) -> None:
    once = _report(rollout=rollout)
    assert _report(once, rollout=rollout, now=LATER) == once


def test_a_lost_replica_is_told_but_takes_nothing_back() -> None:
    before = _report()
    status = _report(before, rollout=LOST_ONE, now=LATER)
    assert status.served == before.served and status.candidate is None
    assert _summary(status)["Ready"] == ("False", "Scaling")
    assert _message(status, "Ready") == "1 of 2 replicas answer"


def test_trouble_is_the_cause_and_becomes_final_when_time_is_up() -> None:
    trouble = Trouble("ServerCrashed", "its last lines: boom")
    early = _report(rollout=STARTING, trouble=trouble)
    assert _summary(early)["Reconciling"] == ("True", "ServerCrashed")
    late = _report(early, rollout=replace(STARTING, overdue=True), trouble=trouble, now=LATER)
    assert _summary(late)["Stalled"] == ("True", "ServerCrashed")
    assert _message(late, "Ready") == "its last lines: boom"
    silent = _report(rollout=replace(STARTING, overdue=True))
    assert _summary(silent)["Stalled"] == ("True", "ProgressDeadlineExceeded")


def test_pods_that_are_not_admitted() -> None:
    status = _report(rollout=replace(STARTING, refused='exceeded quota: "gpus"'))
    assert _summary(status)["Reconciling"] == ("True", "PodsRefused")
    assert 'exceeded quota: "gpus"' in _message(status, "Ready")


def test_no_replicas_is_what_was_asked_for() -> None:
    nothing = replace(COMPLETE, wanted=0, total=0, updated=0, ready=0, available=0)
    status = _report(_report(), rollout=nothing, now=LATER)
    assert _summary(status)["Ready"] == ("True", "ScaledToZero")
    assert _summary(status)["Available"] == ("False", "ScaledToZero")


def test_another_model_than_asked_for_answers_but_is_not_ready() -> None:
    problem = Problem(reason="FineTuneNotReady", message="training", stalled=False)
    status = _report(_report(version=OLD), version=OLD, problem=problem, now=LATER)
    assert _summary(status)["Ready"] == ("False", "FineTuneNotReady")
    assert _summary(status)["Available"] == ("True", "Answering")
    assert status.served is not None and status.served.version == "old"


def test_a_note_does_not_take_readiness_away() -> None:
    status = _report(note='FineTune "mood" works on a newer version')
    assert _summary(status)["Ready"] == ("True", "Serving")
    assert _message(status, "Ready").endswith('; FineTune "mood" works on a newer version')


def test_a_problem_of_the_whole_object_keeps_what_is_known() -> None:
    before = _report()
    body = {"metadata": {"generation": 9}}
    after = report_problem(body, before, Problem(reason="NameTaken", message="m", stalled=True), now=LATER)
    assert (after.served, after.url, after.replicas) == (before.served, before.url, before.replicas)
    assert _summary(after)["Stalled"] == ("True", "NameTaken")
    assert _summary(after)["Available"] == ("True", "Answering")
    assert after.observed_generation == 9
    first = report_problem(body, ModelServeStatus(), Problem(reason="InvalidSpec", message="m", stalled=True), now=NOW)
    assert _summary(first).keys() == {"Ready", "Reconciling", "Stalled", "Available"}


# --- events ----------------------------------------------------------------------------------------------------------


def _told(before: ModelServeStatus, after: ModelServeStatus) -> list[tuple[str, str]]:
    return [(item.type, item.reason) for item in announcements(before, after)]


def test_a_life_in_events() -> None:
    unborn = ModelServeStatus()
    started = _report(rollout=STARTING)
    assert _told(unborn, started) == [("Normal", "ModelRolloutStarted")]
    assert _told(started, started) == []
    served = _report(started, now=LATER)
    assert _told(started, served) == [("Normal", "ModelServed")]
    crashed = _report(served, rollout=LOST_ONE, trouble=Trouble("OutOfMemory", "m"), now=LATER)
    assert _told(served, crashed) == [("Warning", "OutOfMemory")]
    assert _told(crashed, crashed) == []
    assert _told(crashed, _report(crashed, now=LATER)) == []


def test_a_stall_is_a_warning_with_its_sentence() -> None:
    status = _report(version=None, rollout=None, problem=Problem(reason="ExportNotFound", message="m", stalled=True))
    [told] = announcements(ModelServeStatus(), status)
    assert (told.type, told.reason, told.message) == ("Warning", "ExportNotFound", "m")

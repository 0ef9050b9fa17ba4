"""Conditions: one of each type, transition times that tell the truth, and the summary that kstatus reads."""

from datetime import UTC, datetime, timedelta

import pytest

from tuneserve import conditions
from tuneserve.api import Condition
from tuneserve.conditions import Conditions

NOW = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)


def _set(before: Conditions, status: bool | None, *, now: datetime, reason: str = "Because") -> Conditions:
    return conditions.set_condition(
        before, type="Available", status=status, reason=reason, message="m", generation=3, now=now
    )


def _only(found: Conditions) -> Condition:
    assert len(found) == 1
    return found[0]


def test_the_same_observation_later_changes_nothing() -> None:
    first = _set((), True, now=NOW)
    assert _set(first, True, now=LATER) == first


def test_a_new_reason_keeps_the_time_of_the_transition() -> None:
    condition = _only(_set(_set((), True, now=NOW), True, now=LATER, reason="Other"))
    assert (condition.reason, condition.last_transition_time) == ("Other", NOW.replace(microsecond=0))


@pytest.mark.parametrize("status", [False, None])
def test_a_new_status_has_a_new_time(status: bool | None) -> None:
    condition = _only(_set(_set((), True, now=NOW), status, now=LATER))
    assert condition.status == {False: "False", None: "Unknown"}[status]
    assert condition.last_transition_time == LATER.replace(microsecond=0)


def test_what_is_stored_and_read_back_is_equal() -> None:
    condition = _only(_set((), True, now=NOW))
    assert Condition.model_validate(condition.to_body()) == condition


def test_others_stay_in_their_place() -> None:
    before = _set(conditions.as_ready((), reason="R", message="m", generation=1, now=NOW), True, now=NOW)
    after = conditions.as_stalled(before, reason="S", message="m", generation=2, now=LATER)
    assert [condition.type for condition in after] == ["Ready", "Reconciling", "Stalled", "Available"]
    assert after[-1] == before[-1]


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (conditions.as_ready, {"Ready": "True", "Reconciling": "False", "Stalled": "False"}),
        (conditions.as_reconciling, {"Ready": "False", "Reconciling": "True", "Stalled": "False"}),
        (conditions.as_stalled, {"Ready": "False", "Reconciling": "False", "Stalled": "True"}),
    ],
)
def test_the_summary_is_complete(summary: object, expected: dict[str, str]) -> None:
    assert callable(summary)
    found = summary((), reason="Reason", message="message", generation=7, now=NOW)
    assert {condition.type: condition.status for condition in found} == expected
    assert {condition.observed_generation for condition in found} == {7}
    assert {condition.message for condition in found if condition.status == "True"} == {"message"}


@pytest.mark.parametrize("summary", [conditions.as_reconciling, conditions.as_stalled])
def test_what_is_usable_stays_ready_while_something_else_goes_on(summary: object) -> None:
    assert callable(summary)
    found = summary((), reason="Reason", message="m", generation=1, now=NOW, ready=("Serving", "all is well"))
    ready = conditions.find(found, "Ready")
    assert ready is not None
    assert (ready.status, ready.reason, ready.message) == ("True", "Serving", "all is well")

"""Conditions by the conventions of Kubernetes and of kstatus: pure.

`Ready`, `Reconciling` and `Stalled` are always there, from the first sight of an object on: kstatus, Flux and
Argo CD take an object without them for finished. Those of the last two that do not hold have no message.
"""

from collections.abc import Iterable
from datetime import datetime

from tuneserve.api import Condition, ConditionStatus

READY = "Ready"
RECONCILING = "Reconciling"
STALLED = "Stalled"

Conditions = tuple[Condition, ...]

_STATUS = {True: ConditionStatus.TRUE, False: ConditionStatus.FALSE, None: ConditionStatus.UNKNOWN}


def find(conditions: Iterable[Condition], type: str) -> Condition | None:
    return next((condition for condition in conditions if condition.type == type), None)


def holds(conditions: Iterable[Condition], type: str) -> bool:
    """Whether the condition is there and True."""
    condition = find(conditions, type)
    return condition is not None and condition.status == ConditionStatus.TRUE


def set_condition(
    conditions: Iterable[Condition],
    *,
    type: str,
    status: bool | None,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
) -> Conditions:
    """The conditions with this one set; `status` None is Unknown.

    Its transition time changes only with its status, so an unchanged object gives an equal result.
    """
    kept = tuple(conditions)
    before = find(kept, type)
    since = before.last_transition_time if before and before.status == _STATUS[status] else now.replace(microsecond=0)
    condition = Condition(
        type=type,
        status=_STATUS[status],
        observed_generation=generation,
        last_transition_time=since,
        reason=reason,
        message=message,
    )
    if before is None:
        return (*kept, condition)
    return tuple(condition if other.type == type else other for other in kept)


def as_ready(
    conditions: Iterable[Condition], *, reason: str, message: str, generation: int, now: datetime
) -> Conditions:
    """Done: nothing to do until something changes."""
    return _summary(
        conditions,
        {READY: (True, reason, message), RECONCILING: (False, reason, ""), STALLED: (False, reason, "")},
        generation=generation,
        now=now,
    )


def as_reconciling(
    conditions: Iterable[Condition],
    *,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
    ready: tuple[str, str] | None = None,
) -> Conditions:
    """Under way, or held up by something that may pass; `ready` (reason, message): usable all the same."""
    return _summary(
        conditions,
        {
            READY: (True, *ready) if ready else (False, reason, message),
            RECONCILING: (True, reason, message),
            STALLED: (False, reason, ""),
        },
        generation=generation,
        now=now,
    )


def as_stalled(
    conditions: Iterable[Condition],
    *,
    reason: str,
    message: str,
    generation: int,
    now: datetime,
    ready: tuple[str, str] | None = None,
) -> Conditions:
    """Cannot go on until somebody changes something; `ready` (reason, message): what there is stays usable."""
    return _summary(
        conditions,
        {
            READY: (True, *ready) if ready else (False, reason, message),
            RECONCILING: (False, reason, ""),
            STALLED: (True, reason, message),
        },
        generation=generation,
        now=now,
    )


def _summary(
    conditions: Iterable[Condition],
    wanted: dict[str, tuple[bool, str, str]],
    *,
    generation: int,
    now: datetime,
) -> Conditions:
    result = tuple(conditions)
    for type, (status, reason, message) in wanted.items():
        result = set_condition(
            result, type=type, status=status, reason=reason, message=message, generation=generation, now=now
        )
    return result

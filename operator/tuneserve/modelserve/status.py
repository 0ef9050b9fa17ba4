"""What a ModelServe tells about itself: pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from tuneserve import conditions, names
from tuneserve.api import ModelServe, ModelServeStatus, ServedVersion
from tuneserve.modelserve import deployment, service
from tuneserve.modelserve.deployment import Rollout
from tuneserve.modelserve.plan import Choice, Problem, same_version, version_text
from tuneserve.modelserve.trouble import Trouble

AVAILABLE = "Available"
#: Reasons of `Reconciling` that are part of an ordinary life.
_ORDINARY = frozenset({"Starting", "RollingOut", "Scaling", "FineTuneNotReady"})


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was decided and what was found."""

    choice: Choice
    rollout: Rollout | None
    """None: there is no Deployment, and so no Service."""
    trouble: Trouble | None = None


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """An Event to be."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    action: str


def report(modelserve: ModelServe, seen: Observation, *, now: datetime) -> ModelServeStatus:
    """The status by what was seen; equal to the old one when nothing has changed."""
    name, namespace = modelserve.metadata.name, modelserve.metadata.namespace
    before = modelserve.status
    served, candidate = _versions(before, seen, now=now)
    rollout = seen.rollout
    return ModelServeStatus(
        observed_generation=modelserve.metadata.generation,
        conditions=_conditions(modelserve, seen, now=now),
        replicas=rollout.total if rollout else 0,
        ready_replicas=rollout.ready if rollout else 0,
        selector=names.selector_text(deployment.selector(name)),
        url=service.url(name=name, namespace=namespace) if rollout else before.url,
        served=served,
        candidate=candidate,
    )


def report_problem(
    body: Mapping[str, Any], before: ModelServeStatus, problem: Problem, *, now: datetime
) -> ModelServeStatus:
    """The status of an object that could not be handled at all; what is known of its pods stays."""
    generation = body["metadata"].get("generation", 0)
    summary = conditions.as_stalled if problem.stalled else conditions.as_reconciling
    result = summary(before.conditions, reason=problem.reason, message=problem.message, generation=generation, now=now)
    if conditions.find(result, AVAILABLE) is None:
        result = _available(result, rollout=None, generation=generation, now=now)
    return before.model_copy(update={"observed_generation": generation, "conditions": result})


def announcements(before: ModelServeStatus, after: ModelServeStatus) -> Iterator[Announcement]:
    """Events about what has changed."""
    if after.candidate is not None and not same_version(before.candidate, after.candidate):
        message = f"{version_text(after.candidate)} is being rolled out"
        yield Announcement(type="Normal", reason="ModelRolloutStarted", message=message, action="RollOut")
    if after.served is not None and not same_version(before.served, after.served):
        message = f"{version_text(after.served)} is served"
        yield Announcement(type="Normal", reason="ModelServed", message=message, action="RollOut")
    for type in (conditions.STALLED, conditions.RECONCILING):
        old, new = conditions.find(before.conditions, type), conditions.find(after.conditions, type)
        if new is None or not conditions.holds(after.conditions, type) or new.reason in _ORDINARY:
            continue
        if old is None or (old.status, old.reason) != (new.status, new.reason):
            yield Announcement(type="Warning", reason=new.reason, message=new.message, action="Serve")


def _versions(
    before: ModelServeStatus, seen: Observation, *, now: datetime
) -> tuple[ServedVersion | None, ServedVersion | None]:
    version = seen.choice.version
    if version is None or seen.rollout is None:
        return before.served, before.candidate
    if same_version(before.served, version):
        return before.served, None
    if seen.rollout.complete:
        return version.model_copy(update={"since": now.replace(microsecond=0)}), None
    if same_version(before.candidate, version):
        return before.served, before.candidate
    return before.served, version.model_copy(update={"since": now.replace(microsecond=0)})


def _conditions(modelserve: ModelServe, seen: Observation, *, now: datetime) -> conditions.Conditions:
    generation = modelserve.metadata.generation
    problem = seen.choice.problem or _rollout_problem(modelserve, seen)
    before = modelserve.status.conditions
    if problem is None:
        reason, message = _success(modelserve, seen)
        result = conditions.as_ready(before, reason=reason, message=message, generation=generation, now=now)
    else:
        summary = conditions.as_stalled if problem.stalled else conditions.as_reconciling
        result = summary(before, reason=problem.reason, message=problem.message, generation=generation, now=now)
    return _available(result, rollout=seen.rollout, generation=generation, now=now)


def _available(
    before: conditions.Conditions, *, rollout: Rollout | None, generation: int, now: datetime
) -> conditions.Conditions:
    if rollout is not None and rollout.available:
        holds, reason, message = True, "Answering", "requests are answered"
    elif rollout is not None and rollout.wanted == 0:
        holds, reason, message = False, "ScaledToZero", "spec.replicas is 0, so nothing answers requests"
    else:
        holds, reason, message = False, "NotAnswering", "no replica answers requests"
    return conditions.set_condition(
        before, type=AVAILABLE, status=holds, reason=reason, message=message, generation=generation, now=now
    )


def _rollout_problem(modelserve: ModelServe, seen: Observation) -> Problem | None:
    """Why what was chosen is not served by all replicas yet."""
    rollout = seen.rollout
    if rollout is None:
        return Problem(reason="Starting", message="the Deployment of the servers is being made", stalled=False)
    if rollout.complete:
        return None
    if rollout.refused is not None:
        return Problem(
            reason="PodsRefused", message=f"pods are not admitted: {rollout.refused}", stalled=rollout.overdue
        )
    counts = f"{rollout.available} of {rollout.wanted} replicas answer"
    if seen.trouble is not None:
        return Problem(reason=seen.trouble.reason, message=seen.trouble.message, stalled=rollout.overdue)
    if rollout.overdue:
        message = f"{counts}, and the others did not start in time, for no reason that their pods tell"
        return Problem(reason="ProgressDeadlineExceeded", message=message, stalled=True)
    version = seen.choice.version
    assert version is not None  # a Deployment without a version is not applied
    before = modelserve.status.served
    if before is None:
        return Problem(reason="Starting", message=f"{version_text(version)} is being loaded: {counts}", stalled=False)
    if not same_version(before, version) or rollout.updated < rollout.wanted:
        message = f"{version_text(version)} is being rolled out: {rollout.updated} of {rollout.wanted} pods are new"
        return Problem(reason="RollingOut", message=message, stalled=False)
    return Problem(reason="Scaling", message=counts, stalled=False)


def _success(modelserve: ModelServe, seen: Observation) -> tuple[str, str]:
    assert seen.choice.version is not None and seen.rollout is not None
    what = version_text(seen.choice.version)
    note = f"; {seen.choice.note}" if seen.choice.note else ""
    if seen.rollout.wanted == 0:
        return "ScaledToZero", f"spec.replicas is 0: {what} is served as soon as there are replicas{note}"
    count = f"{seen.rollout.wanted} replica{'' if seen.rollout.wanted == 1 else 's'}"
    address = service.url(name=modelserve.metadata.name, namespace=modelserve.metadata.namespace)
    return "Serving", f"{what} is served by {count} at {address}{note}"

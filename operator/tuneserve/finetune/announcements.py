"""What changed between two statuses of a FineTune, as events for `kubectl describe`. Pure."""

from dataclasses import dataclass
from typing import Literal

from tuneserve.api import FineTuneStatus, StageState, StageStatus
from tuneserve.conditions import READY, STALLED, find, holds


@dataclass(frozen=True, kw_only=True)
class Announcement:
    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    action: str


def announcements(*, before: FineTuneStatus, after: FineTuneStatus) -> tuple[Announcement, ...]:
    """One for each stage that started, succeeded or failed, and for becoming Ready or Stalled."""
    earlier = {stage.name: stage for stage in before.stages}
    told = [told for stage in after.stages if (told := _of_stage(stage, before=earlier.get(stage.name))) is not None]
    ready = find(after.conditions, READY)
    if ready is not None and holds(after.conditions, READY) and not holds(before.conditions, READY):
        told.append(Announcement(type="Normal", reason="Ready", message=ready.message, action="Report"))
    stalled = find(after.conditions, STALLED)
    if stalled is not None and holds(after.conditions, STALLED):
        old = find(before.conditions, STALLED)
        failed = {stage.message for stage in after.stages if stage.state is StageState.FAILED}
        news = old is None or (old.status, old.reason) != (stalled.status, stalled.reason)
        if news and stalled.message not in failed:
            told.append(Announcement(type="Warning", reason=stalled.reason, message=stalled.message, action="Report"))
    return tuple(told)


def _of_stage(stage: StageStatus, *, before: StageStatus | None) -> Announcement | None:
    same = before is not None and before.hash == stage.hash
    if same and before is not None and before.state is stage.state:
        return None
    if stage.state is StageState.RUNNING:
        where = f" on node {stage.node}" if stage.node else ""
        return Announcement(
            type="Normal", reason="StageStarted", message=f"{stage.name} runs as Job {stage.job}{where}", action="Run"
        )
    if stage.state is StageState.SUCCEEDED and stage.job is not None:
        return Announcement(
            type="Normal",
            reason="StageSucceeded",
            message=f"{stage.name} is done, its output is {stage.name}/{stage.hash} on the artifacts claim",
            action="Run",
        )
    if stage.state is StageState.FAILED:
        return Announcement(
            type="Warning",
            reason="StageFailed",
            message=f"{stage.name} failed: {stage.reason}: {stage.message}",
            action="Run",
        )
    return None

"""The status of a FineTune: what exists, what goes on, and why not more. Pure, and equal for equal input."""

from datetime import datetime, timedelta

from tuneserve.api import FineTune, FineTuneStatus, Progress, Resolved, StageState, StageStatus
from tuneserve.conditions import as_stalled
from tuneserve.finetune.artifacts import artifacts
from tuneserve.finetune.decisions import Plan, StagePlan, foremost
from tuneserve.finetune.gates import decimal_text
from tuneserve.finetune.graph import PREPARE, TRAIN
from tuneserve.finetune.milestones import milestones
from tuneserve.finetune.summary import summarize


def status(
    fine_tune: FineTune, *, plan: Plan, progress: Progress | None, has_claim: bool, now: datetime
) -> FineTuneStatus:
    """The whole status; `progress` is what the running stage has told, None when none has."""
    found = artifacts(fine_tune, plan=plan, has_claim=has_claim)
    conditions = milestones(fine_tune, plan=plan, now=now)
    return FineTuneStatus(
        observed_generation=fine_tune.metadata.generation,
        conditions=summarize(conditions, fine_tune=fine_tune, plan=plan, artifacts=found, now=now),
        resolved=_resolved(plan),
        stages=tuple(_stage_status(stage, fine_tune=fine_tune) for stage in plan.stages),
        progress=_progress(plan, told=progress),
        artifacts=found,
    )


def invalid(*, before: FineTuneStatus, message: str, generation: int, now: datetime) -> FineTuneStatus:
    """The status of an object whose spec cannot be read."""
    conditions = as_stalled(before.conditions, reason="InvalidSpec", message=message, generation=generation, now=now)
    return before.model_copy(update={"observed_generation": generation, "conditions": conditions, "progress": None})


# --- stages ----------------------------------------------------------------------------------------------------------


def _stage_status(plan: StagePlan, *, fine_tune: FineTune) -> StageStatus:
    if plan.remembered is not None:
        return plan.remembered
    hash = plan.run.hash if plan.run else None
    earlier = next((stage for stage in fine_tune.status.stages if stage.name == plan.stage.name), None)
    if earlier is not None and earlier.hash != hash:
        earlier = None
    job, pod = plan.job, plan.job.pod if plan.job else None
    name = job.name if job else None
    if plan.launch is not None:
        name = str(plan.launch.job["metadata"]["name"])
    started, finished = job.started if job else None, None
    if plan.outcome is not None:
        finished = plan.finished
        started = finished - timedelta(seconds=round(plan.outcome.seconds)) if finished else started
    elif plan.state is StageState.FAILED and job is not None:
        finished = job.finished
    return StageStatus(
        name=plan.stage.name,
        hash=hash,
        state=plan.state,
        attempt=_attempt(plan, earlier=earlier),
        job=name or (earlier.job if earlier else None),
        node=(pod.node if pod else None) or (earlier.node if earlier else None),
        start_time=started,
        completion_time=finished,
        reason=plan.finding.reason if plan.finding else None,
        message=plan.finding.message if plan.finding else None,
        terms=plan.terms if plan.state is StageState.FAILED else None,
    )


def _attempt(plan: StagePlan, *, earlier: StageStatus | None) -> int | None:
    before = earlier.attempt if earlier else None
    if plan.job is None:
        return 1 if plan.launch is not None else before
    return max(plan.job.attempt, before or 1)


def _resolved(plan: Plan) -> Resolved | None:
    prepared = plan.stage(PREPARE)
    if prepared is None or prepared.outcome is None:
        return None
    facts = prepared.outcome.facts
    return Resolved(
        revision=facts.get("revision") or None,
        dataset_digest=facts.get("datasetDigest"),
        template_hash=facts.get("templateHash"),
    )


def _progress(plan: Plan, *, told: Progress | None) -> Progress | None:
    """What runs now. The loss of a finished training stays: it is what a user wants to see beside the metrics."""
    trained = plan.stage(TRAIN)
    losses = trained.outcome.metrics if trained is not None and trained.outcome is not None else {}
    loss = decimal_text("loss", losses["loss"]) if "loss" in losses else None
    running = [stage for stage in plan.stages if stage.state is StageState.RUNNING]
    main = foremost(running)
    if told is not None and told.stage in {stage.stage.name for stage in running}:
        return told if told.loss is not None else told.model_copy(update={"loss": loss})
    if main is not None:
        return Progress(stage=main.stage.name, loss=loss)
    return Progress(loss=loss) if loss is not None else None

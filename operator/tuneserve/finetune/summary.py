"""The conditions that kstatus, Flux, Argo CD and `kubectl wait` read: Ready, Reconciling, Stalled. Pure.

Ready: every export is there and measured, and at least one may be served. Stalled: only an edit, or what a message
asks for, helps. A message names the true cause and what to do, for somebody who sees nothing else.
"""

from datetime import datetime

from tuneserve import names
from tuneserve.api import Artifact, Condition, FineTune, StageState, Verdict
from tuneserve.conditions import READY, RECONCILING, STALLED, as_ready, as_reconciling, as_stalled, set_condition
from tuneserve.finetune.decisions import Plan, foremost
from tuneserve.finetune.graph import StageKind
from tuneserve.finetune.milestones import sentence

Conditions = tuple[Condition, ...]

_DOING = {
    StageKind.PREPARE: "Preparing",
    StageKind.TRAIN: "Training",
    StageKind.MERGE: "Merging",
    StageKind.EVALUATE: "Evaluating",
}


def summarize(
    conditions: Conditions, *, fine_tune: FineTune, plan: Plan, artifacts: tuple[Artifact, ...], now: datetime
) -> Conditions:
    """The conditions with the three brought up to date."""
    generation = fine_tune.metadata.generation
    left = [stage for stage in plan.stages if stage.outcome is None]
    passing = [stage for stage in left if stage.passing]
    held = [stage for stage in left if stage.held]
    fault = plan.claim_fault
    message = "; ".join(dict.fromkeys(sentence(stage) for stage in left if stage.passing or stage.held))
    main = foremost(passing)
    if main is not None:
        reason = main.finding.reason if main.finding else _DOING[main.stage.kind]
        return as_reconciling(conditions, reason=reason, message=message, generation=generation, now=now)
    if fault is not None:
        conclude = as_stalled if fault.stalled else as_reconciling
        return conclude(conditions, reason=fault.reason, message=fault.message, generation=generation, now=now)
    if any(stage.state is StageState.SUSPENDED for stage in left):
        return _suspended(conditions, held=message, generation=generation, now=now)
    if held:
        reason = next(stage.finding.reason for stage in held if stage.finding is not None)
        return as_stalled(conditions, reason=reason, message=message, generation=generation, now=now)
    note = _misspelt(fine_tune.metadata.annotations.get(names.REBUILD, ""), plan=plan)
    return _finished(conditions, artifacts=artifacts, note=note, generation=generation, now=now)


def best(artifact: Artifact) -> str:
    """The main metric of an artifact, beside that of the base model."""
    if not artifact.metrics:
        return f"{artifact.export} has no metrics"
    main = artifact.metrics[0]
    base = f" (base model {main.base})" if main.base is not None else ""
    return f"{artifact.export}: {main.name} {main.value}{base}"


def _misspelt(rebuild: str, *, plan: Plan) -> str:
    """What is to be said of a rebuild annotation that names no stage: else it would do nothing without a word."""
    stages = [stage.stage.name for stage in plan.stages]
    wrong = [name for entry in rebuild.split(",") if (name := entry.strip().partition(".")[0]) and name not in stages]
    if not wrong:
        return ""
    return f". The annotation {names.REBUILD} names {', '.join(wrong)}, but the stages are {', '.join(stages)}"


def _finished(
    conditions: Conditions, *, artifacts: tuple[Artifact, ...], note: str, generation: int, now: datetime
) -> Conditions:
    usable = [artifact for artifact in artifacts if artifact.verdict is not Verdict.FAILED]
    refused = [f"{artifact.export}: {artifact.reason}" for artifact in artifacts if artifact.verdict is Verdict.FAILED]
    failures = "; ".join(refused)
    if not usable:
        message = f"no export passes its gates. {failures}. Better data or another training may help, or a lower gate"
        return as_stalled(conditions, reason="GatesFailed", message=message, generation=generation, now=now)
    message = "; ".join(best(artifact) for artifact in usable)
    if refused:
        message += f". Gates failed: {failures}"
    return as_ready(
        conditions,
        reason="SomeGatesFailed" if refused else "ArtifactsReady",
        message=message + note,
        generation=generation,
        now=now,
    )


def _suspended(conditions: Conditions, *, held: str, generation: int, now: datetime) -> Conditions:
    message = "suspended by spec.suspend; set it to false to go on" + (f". {held}" if held else "")
    for type in (READY, RECONCILING, STALLED):
        conditions = set_condition(
            conditions, type=type, status=False, reason="Suspended", message=message, generation=generation, now=now
        )
    return conditions

"""The conditions that tell how far a FineTune is: DataValid, Trained, Exported, Evaluated. Pure.

They are there from the first sight on, as Unknown: a condition that is missing reads as "not supported".
"""

from collections.abc import Iterable
from datetime import datetime

from tuneserve.api import Condition, ConditionStatus, FineTune, FineTuneStatus, StageState
from tuneserve.conditions import find, set_condition
from tuneserve.finetune.decisions import Plan, StagePlan
from tuneserve.finetune.gates import decimal_text
from tuneserve.finetune.graph import PREPARE, TRAIN, StageKind, export_path

DATA_VALID = "DataValid"
TRAINED = "Trained"
EXPORTED = "Exported"
EVALUATED = "Evaluated"

#: Status (None: Unknown), reason and message of a condition.
Milestone = tuple[bool | None, str, str]


def milestones(fine_tune: FineTune, *, plan: Plan, now: datetime) -> tuple[Condition, ...]:
    """The conditions of the object with these four brought up to date."""
    conditions = fine_tune.status.conditions
    for type, (status, reason, message) in _milestones(fine_tune, plan).items():
        conditions = set_condition(
            conditions,
            type=type,
            status=status,
            reason=reason,
            message=message,
            generation=fine_tune.metadata.generation,
            now=now,
        )
    return conditions


def sentence(stage: StagePlan) -> str:
    """How an unfinished stage stands."""
    name = stage.stage.name
    if stage.finding is not None:
        message = stage.finding.message
        # What a stage says of its inputs names the place itself, and is passed on as it is.
        return message if stage.finding.final or name in message else f"{name}: {message}"
    if stage.state is StageState.RUNNING:
        return f"{name} runs"
    if stage.state is StageState.SUSPENDED:
        return f"{name} is suspended"
    return f"{name} starts"


def _milestones(fine_tune: FineTune, plan: Plan) -> dict[str, Milestone]:
    method = fine_tune.spec.method
    producers = {export_path(export.format, method=method).producer for export in fine_tune.spec.exports}
    trained = plan.stage(TRAIN)
    return {
        DATA_VALID: _data_valid(plan.stage(PREPARE), before=fine_tune.status),
        TRAINED: _milestone([stage for stage in plan.stages if stage is trained], done=_training(trained)),
        EXPORTED: _milestone(
            [stage for stage in plan.stages if stage.stage.name in producers],
            done="all exports are on the artifacts claim",
        ),
        EVALUATED: _milestone(
            [stage for stage in plan.stages if stage.stage.kind is StageKind.EVALUATE],
            done="the exports and the base model are measured on the test rows",
        ),
    }


def _milestone(stages: Iterable[StagePlan], *, done: str) -> Milestone:
    left = [stage for stage in stages if stage.outcome is None]
    if not left:
        return True, "Done", done
    failed = next((stage for stage in left if stage.state is StageState.FAILED), None)
    if failed is not None and failed.finding is not None:
        return False, failed.finding.reason, failed.finding.message
    return None, _reason(left[0]), sentence(left[0])


def _data_valid(prepared: StagePlan | None, *, before: FineTuneStatus) -> Milestone:
    if prepared is None:
        raise ValueError("every graph prepares")
    if prepared.outcome is not None:
        facts = prepared.outcome.facts
        purposes = {"trainRows": "training", "validationRows": "validation", "testRows": "the test"}
        rows = [f"{facts[key]} for {purpose}" for key, purpose in purposes.items() if key in facts]
        message = f"rows: {', '.join(rows)}" if rows else "the data can be learned from"
        return True, "Done", f"{message}. Worth a look: {facts['warnings']}" if facts.get("warnings") else message
    if prepared.state is StageState.FAILED and prepared.finding is not None:
        blamed = prepared.finding.blames_data
        earlier = find(before.conditions, DATA_VALID)
        if prepared.remembered is not None and earlier is not None:
            blamed = earlier.status is ConditionStatus.FALSE
        return False if blamed else None, prepared.finding.reason, prepared.finding.message
    return None, _reason(prepared), sentence(prepared)


def _training(trained: StagePlan | None) -> str:
    outcome = trained.outcome if trained else None
    if outcome is None:
        return ""
    parts = [f"{outcome.facts['steps']} steps"] if "steps" in outcome.facts else []
    for key, name in (("loss", "loss"), ("evalLoss", "validation loss")):
        if key in outcome.metrics:
            parts.append(f"{name} {decimal_text(key, outcome.metrics[key])}")
    return ", ".join(parts) or "the training is done"


def _reason(stage: StagePlan) -> str:
    if stage.finding is not None:
        return stage.finding.reason
    return stage.state.value

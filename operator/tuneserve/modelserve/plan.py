"""Which version of a model a ModelServe shall serve, and what stands in the way: pure.

What is served is never taken away for want of something better: a FineTune that is deleted, trains again or fails
its gates leaves the version of before in place.
"""

from dataclasses import dataclass

from tuneserve import conditions, names
from tuneserve.api import (
    Artifact,
    Condition,
    ExportFormat,
    FineTune,
    FineTuneReference,
    ServedModel,
    ServedVersion,
    Verdict,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why not all is as the spec asks; becomes a condition."""

    reason: str
    message: str
    stalled: bool
    """Only an edit helps; otherwise it may pass by itself."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What shall run."""

    version: ServedVersion | None
    """None: there is nothing that could be served yet."""
    problem: Problem | None = None
    """Set: `version` is not what the spec asks for, only what there is."""
    note: str = ""
    """A sentence about a newer version that is not served (yet)."""


def choose(model: ServedModel, *, finetune: FineTune | None, current: ServedVersion | None) -> Choice:
    """The version to serve; `finetune` is the one that the spec names, `current` is what runs now."""
    if model.claim is not None:
        return Choice(version=ServedVersion(claim=model.claim.name, path=model.claim.path))
    assert model.fine_tune is not None  # the API admits exactly one of the two
    return _from_finetune(model.fine_tune, finetune=finetune, current=current)


def same_version(one: ServedVersion | None, other: ServedVersion | None) -> bool:
    """Whether both are the same content, whenever they came to be served."""
    if one is None or other is None:
        return one is other
    return one.model_copy(update={"since": None}) == other.model_copy(update={"since": None})


def version_text(version: ServedVersion) -> str:
    """The version as a user would name it."""
    if version.version is not None:
        return f"version {version.version}"
    return f"{version.path or 'the root'} of claim {version.claim}"


def _from_finetune(reference: FineTuneReference, *, finetune: FineTune | None, current: ServedVersion | None) -> Choice:
    what = f'FineTune "{reference.name}"'
    fits = current is not None and _comes_from(reference, current)

    def waits(problem: Problem, *, note: str) -> Choice:
        return Choice(version=current, note=note) if fits else Choice(version=current, problem=problem)

    if finetune is None:
        message = f"{what} does not exist in this namespace: create it, or correct spec.model.fineTune.name"
        return waits(
            Problem(reason="FineTuneNotFound", message=message, stalled=False),
            note=f"{what} is gone; serving goes on without it",
        )
    if (problem := _export_problem(reference, finetune, what=what)) is not None:
        return Choice(version=current, problem=problem)
    artifact = next((item for item in finetune.status.artifacts if item.export == reference.export), None)
    if artifact is None or artifact.digest is None or artifact.verdict == Verdict.PENDING:
        return waits(_not_ready(reference, finetune, what=what), note=f"{what} works on a newer version")
    if reference.version is not None and reference.version != artifact.version:
        message = (
            f'{what} has version {artifact.version} of export "{reference.export}", not {reference.version}: '
            "correct spec.model.fineTune.version, or leave it out to follow the latest one"
        )
        return waits(
            Problem(reason="VersionNotFound", message=message, stalled=True),
            note=f"{what} has version {artifact.version} now; spec.model.fineTune.version holds this one",
        )
    if artifact.verdict == Verdict.FAILED:
        message = (
            f"version {artifact.version} of {what} does not pass its gates: {artifact.reason or 'no reason given'}"
        )
        return waits(Problem(reason="GatesNotPassed", message=message, stalled=True), note=message)
    return Choice(version=_version_of(artifact))


def _comes_from(reference: FineTuneReference, version: ServedVersion) -> bool:
    return (
        version.version is not None
        and version.claim == names.artifacts_claim(reference.name)
        and reference.version in (None, version.version)
    )


def _version_of(artifact: Artifact) -> ServedVersion:
    return ServedVersion(
        version=artifact.version, digest=artifact.digest, claim=artifact.claim, path=artifact.path.strip("/")
    )


def _export_problem(reference: FineTuneReference, finetune: FineTune, *, what: str) -> Problem | None:
    exports = {export.name: export.format for export in finetune.spec.exports}
    format = exports.get(reference.export)
    if format is None:
        found = ", ".join(exports) or "none"
        message = f'{what} has no export "{reference.export}": set spec.model.fineTune.export to one of: {found}'
        return Problem(reason="ExportNotFound", message=message, stalled=True)
    if format != ExportFormat.MERGED:
        merged = ", ".join(name for name, other in exports.items() if other == ExportFormat.MERGED)
        advice = f"serve one of: {merged}" if merged else f"add an export of format {ExportFormat.MERGED} to it"
        message = f'export "{reference.export}" of {what} has format {format}, which cannot be served alone: {advice}'
        return Problem(reason="ExportNotServable", message=message, stalled=True)
    return None


def _not_ready(reference: FineTuneReference, finetune: FineTune, *, what: str) -> Problem:
    stalled = conditions.find(finetune.status.conditions, conditions.STALLED)
    if stalled is not None and conditions.holds(finetune.status.conditions, conditions.STALLED):
        return Problem(reason="FineTuneStalled", message=f"{what} cannot go on: {stalled.message}", stalled=True)
    doing = conditions.find(finetune.status.conditions, conditions.RECONCILING)
    return Problem(
        reason="FineTuneNotReady",
        message=f'{what} has no finished export "{reference.export}" yet{_because(doing)}',
        stalled=False,
    )


def _because(doing: Condition | None) -> str:
    return f": {doing.message}" if doing is not None and doing.message else ""

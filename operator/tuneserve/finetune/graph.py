"""The stages that a FineTune needs, derived from its exports and its method alone.

Pure, and it knows nothing of Kubernetes: what a stage needs of a cluster is decided in `jobs`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from tuneserve.api import ExportFormat
from tuneserve_pipeline.contract import ADAPTER_DIRECTORY, MODEL_DIRECTORY, EvaluationTarget, Method


class StageKind(StrEnum):
    """The command that runs a stage: `python -m tuneserve_pipeline <kind>`."""

    PREPARE = "prepare"
    TRAIN = "train"
    MERGE = "merge"
    EVALUATE = "evaluate"


#: Kinds that compute on the profile's device; any other would only keep a GPU from somebody else.
_DEVICE_KINDS = frozenset({StageKind.TRAIN, StageKind.EVALUATE})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of the graph."""

    name: str
    """Unique in the graph; also the name of its directory on the artifacts claim."""
    kind: StageKind
    parents: tuple[str, ...] = ()
    """Stages whose output this one reads; their digests are part of its input hash."""
    target: EvaluationTarget | None = None
    """What an evaluation measures; None for every other kind."""

    @property
    def uses_device(self) -> bool:
        """Whether it runs on the profile's GPU, if the profile has one."""
        return self.kind in _DEVICE_KINDS


@dataclass(frozen=True, kw_only=True)
class ExportPath:
    """How the artifacts of one format come to be."""

    producer: str
    """Stage whose output holds the artifact; its hash is the artifact's version."""
    directory: str
    """Below the producer's output directory."""
    evaluation: str
    """Stage that measures it."""


PREPARE = "prepare"
TRAIN = "train"
MERGE = "merge"
EVALUATE_BASE = "evaluate-base"
EVALUATE_ADAPTER = "evaluate-adapter"
EVALUATE_MERGED = "evaluate-merged"

#: Every stage there is, each after those that it reads. Jobs are made in this order: where there is one GPU, the
#: training gets it before the evaluation of the base model, which nothing waits for but the end.
STAGES: tuple[Stage, ...] = (
    Stage(name=PREPARE, kind=StageKind.PREPARE),
    Stage(name=TRAIN, kind=StageKind.TRAIN, parents=(PREPARE,)),
    Stage(name=MERGE, kind=StageKind.MERGE, parents=(PREPARE, TRAIN)),
    Stage(name=EVALUATE_BASE, kind=StageKind.EVALUATE, parents=(PREPARE,), target=EvaluationTarget.BASE),
    Stage(name=EVALUATE_ADAPTER, kind=StageKind.EVALUATE, parents=(PREPARE, TRAIN), target=EvaluationTarget.ADAPTER),
    Stage(name=EVALUATE_MERGED, kind=StageKind.EVALUATE, parents=(PREPARE, MERGE), target=EvaluationTarget.MERGED),
)

EXPORT_PATHS: dict[ExportFormat, ExportPath] = {
    ExportFormat.ADAPTER: ExportPath(producer=TRAIN, directory=ADAPTER_DIRECTORY, evaluation=EVALUATE_ADAPTER),
    ExportFormat.MERGED: ExportPath(producer=MERGE, directory=MODEL_DIRECTORY, evaluation=EVALUATE_MERGED),
}


def stages(method: Method) -> tuple[Stage, ...]:
    """Every stage that there is for a method. Where the training puts out a whole model, nothing is merged."""
    if method is not Method.FULL:
        return STAGES
    kept = (stage for stage in STAGES if stage.name != MERGE)
    return tuple(
        replace(stage, parents=tuple(dict.fromkeys(TRAIN if name == MERGE else name for name in stage.parents)))
        for stage in kept
    )


def export_path(format: ExportFormat, *, method: Method) -> ExportPath:
    path = EXPORT_PATHS[format]
    merged = path.producer == MERGE and method is Method.FULL
    return replace(path, producer=TRAIN) if merged else path


def has_form(path: str, *, format: ExportFormat) -> bool:
    """Whether `path`, below the claim, is an artifact of that format, by whatever method it was made."""
    return any(
        path.startswith(f"{made.producer}/") and path.endswith(f"/{made.directory}")
        for made in (export_path(format, method=method) for method in Method)
    )


def graph(formats: Iterable[ExportFormat], *, method: Method = Method.QLORA) -> tuple[Stage, ...]:
    """The stages that artifacts of these formats need, each after its parents.

    The base model is always evaluated: a figure of a tuned model says nothing without that of its base.
    """
    known = stages(method)
    by_name = {stage.name: stage for stage in known}
    wanted = {EVALUATE_BASE}
    for format in formats:
        path = export_path(format, method=method)
        wanted |= {path.producer, path.evaluation}
    needed = {name for stage in wanted for name in _with_ancestors(stage, by_name)}
    return tuple(stage for stage in known if stage.name in needed)


def _with_ancestors(name: str, by_name: Mapping[str, Stage]) -> Iterator[str]:
    yield name
    for parent in by_name[name].parents:
        yield from _with_ancestors(parent, by_name)

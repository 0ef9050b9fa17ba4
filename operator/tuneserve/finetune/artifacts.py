"""What a FineTune has put out, as its status lists it: one artifact for each export. Pure."""

import math
from collections.abc import Iterable, Mapping

from tuneserve import names
from tuneserve.api import Artifact, Export, FineTune, Metric, Verdict
from tuneserve.api.finetune import CLASSIFICATION_METRICS, INSTRUCTION_METRICS, TEXT_METRICS
from tuneserve.finetune.decisions import Plan
from tuneserve.finetune.gates import decimal_text, judge
from tuneserve.finetune.graph import EVALUATE_BASE, export_path, has_form
from tuneserve_pipeline.contract import output_path

#: Bounds of the status; a stage that tells more is not worth an object that cannot be reported on.
_MOST_METRICS = 32
_LONGEST_NAME = 63
_MAIN_FIRST = (*CLASSIFICATION_METRICS, *INSTRUCTION_METRICS, *TEXT_METRICS)


def artifacts(fine_tune: FineTune, *, plan: Plan, has_claim: bool) -> tuple[Artifact, ...]:
    """The artifacts, judged by the gates as they are now.

    An artifact of earlier inputs stays until the one that replaces it is measured: a server may go on with it.
    """
    before = {artifact.export: artifact for artifact in fine_tune.status.artifacts} if has_claim else {}
    found = (
        _artifact(export, fine_tune=fine_tune, plan=plan, before=before.get(export.name))
        for export in fine_tune.spec.exports
    )
    return tuple(_judged(artifact, fine_tune=fine_tune) for artifact in found if artifact is not None)


def _artifact(export: Export, *, fine_tune: FineTune, plan: Plan, before: Artifact | None) -> Artifact | None:
    path = export_path(export.format, method=fine_tune.spec.method)
    if before is not None and not has_form(before.path, format=export.format):
        before = None  # the export has another format by now
    producer, evaluation, base = plan.stage(path.producer), plan.stage(path.evaluation), plan.stage(EVALUATE_BASE)
    if producer is None or producer.outcome is None or producer.run is None:
        return before
    measured = evaluation.outcome if evaluation is not None else None
    if measured is None and before is not None:
        return before
    base_outcome = base.outcome if base is not None else None
    return Artifact(
        export=export.name,
        version=producer.run.hash,
        claim=names.artifacts_claim(fine_tune.metadata.name),
        path=f"{output_path(stage=producer.run.stage, hash=producer.run.hash)}/{path.directory}",
        size_bytes=producer.outcome.size_bytes,
        digest=producer.outcome.digest,
        metrics=_metrics(measured.metrics, base=base_outcome.metrics if base_outcome else {}) if measured else (),
        verdict=Verdict.PENDING,
    )


def _judged(artifact: Artifact, *, fine_tune: FineTune) -> Artifact:
    verdict, reason = judge(export=artifact.export, metrics=artifact.metrics, gates=fine_tune.spec.gates)
    return artifact.model_copy(update={"verdict": verdict, "reason": reason})


def _metrics(values: Mapping[str, float], *, base: Mapping[str, float]) -> tuple[Metric, ...]:
    return tuple(
        Metric(
            name=name,
            value=decimal_text(name, values[name]),
            base=decimal_text(name, base[name]) if math.isfinite(base.get(name, math.nan)) else None,
        )
        for name in _ordered(values)
        if math.isfinite(values[name]) and len(name) <= _LONGEST_NAME
    )[:_MOST_METRICS]


def _ordered(metric_names: Iterable[str]) -> list[str]:
    rank = {name: index for index, name in enumerate(_MAIN_FIRST)}
    return sorted(metric_names, key=lambda name: (rank.get(name, len(rank)), name))

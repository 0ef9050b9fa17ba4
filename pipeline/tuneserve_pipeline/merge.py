"""Adds the adapter to the original 16-bit base, and proves that the result answers as base and adapter together do.

Never into the quantized base: that would quantize the sum a second time, and nothing could read it.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve_pipeline.contract import ADAPTER_DIRECTORY, MODEL_DIRECTORY, MergeSpec
from tuneserve_pipeline.errors import InvalidConfig, StageFailure
from tuneserve_pipeline.machine import configure_process
from tuneserve_pipeline.models import load_model, write_model
from tuneserve_pipeline.rows import Row, read_rows
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tables import TRAIN_FILE, VALIDATION_FILE
from tuneserve_pipeline.tokenization import Base, read_base

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tuneserve_pipeline.fidelity import Fidelity

log = logging.getLogger(__name__)

#: Rows of the held-out data that merged and unmerged model are compared on, and how many tokens they may have in all.
COMPARED_ROWS = 64
COMPARED_TOKENS = 4096


def run(job: StageRun) -> StageResult:
    assert isinstance(job.spec, MergeSpec)
    configure_process()
    prepared, trained = job.input("prepare"), job.input("train")
    base = read_base(prepared)
    rows = _compared_rows(prepared)

    from tuneserve_pipeline import fidelity

    target = job.partial / MODEL_DIRECTORY
    model = load_adapted(base, trained / ADAPTER_DIRECTORY)
    job.progress.update(ratio=0.2)
    reference = fidelity.answer_logits(model, rows)
    job.progress.update(ratio=0.35)
    merged = merge(model)
    job.progress.update(ratio=0.5)
    write_model(merged, base=base, target=target)
    job.progress.update(ratio=0.75)

    again = load_model(target)
    different = fidelity.same_parameters(merged, again)
    if different is not None:
        raise StageFailure(
            reason="MergeDamaged",
            message=f"the merged model reads back otherwise than it was written (first in {different}): the volume "
            "lost data; run the stage again",
        )
    del model, merged
    try:
        figures = fidelity.compare(reference, fidelity.answer_logits(again, rows))
    except ValueError as error:
        raise InvalidConfig(reason="MergeUnfaithful", message=f"the merged model does not work: {error}") from error
    log.info(
        "%d positions: top-1 agreement %.4f, largest difference of logits %.4f",
        figures.positions,
        figures.top1_agreement,
        figures.max_logit_difference,
    )
    check(figures)
    return StageResult(
        metrics={
            "mergeTop1Agreement": figures.top1_agreement,
            "mergeMaxLogitDifference": figures.max_logit_difference,
        },
        facts={"dtype": str(again.dtype).removeprefix("torch."), "comparedPositions": str(figures.positions)},
    )


def check(figures: "Fidelity") -> None:
    """Raises `InvalidConfig` for a merged model that answers otherwise than what was trained."""
    from tuneserve_pipeline.fidelity import LEAST_AGREEMENT

    if figures.top1_agreement < LEAST_AGREEMENT:
        raise InvalidConfig(
            reason="MergeUnfaithful",
            message=f"the merged model chooses another token than base and adapter at {1 - figures.top1_agreement:.1%} "
            f"of {figures.positions} positions (at most {1 - LEAST_AGREEMENT:.0%} may differ): the adapter's "
            "weights are too large for 16 bits; lower spec.training.learningRate or spec.lora.alpha",
        )


def _compared_rows(prepared: Path) -> list[Row]:
    """Rows that were not trained on, if there are any."""
    for name in (VALIDATION_FILE, TRAIN_FILE):
        rows = read_rows(prepared / name, limit=COMPARED_ROWS)
        if rows:
            return rows[: max(1, COMPARED_TOKENS // int(rows.lengths.max()))]
    raise InvalidConfig(
        reason="NoRows",
        message="prepare left no rows at all. Make them again with the annotation tuneserve.dev/rebuild: prepare",
    )


def load_adapted(base: Base, adapter: Path) -> "PeftModel":
    """The original base with the adapter on it; the adapter's own weights in fp32."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base.path), str(adapter), autocast_adapter_dtype=True)


def merge(model: "PeftModel") -> "PreTrainedModel":
    """The base with the adapter added, each weight computed in fp32 and rounded once.

    PEFT's own merge rounds the adapter's part first and the sum again.
    """
    import torch
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, IA3Layer | LoraLayer)]
    if not layers:
        raise InvalidConfig(
            reason="NothingToMerge",
            message=f"an adapter of the kind {model.active_peft_config.peft_type.value} changes no weights, so there "
            "is nothing to merge: export the format Adapter",
        )
    with torch.no_grad():
        for name, layer in layers:
            base = layer.get_base_layer()
            _put(base, "weight", _weight(layer), name=name)
            if isinstance(layer, IA3Layer) and not layer.is_feedforward and base.bias is not None:
                _put(base, "bias", base.bias.float() * _scale(layer).reshape(-1), name=name)
    merged: PreTrainedModel = model.unload()
    return merged


def _weight(layer: Any) -> "torch.Tensor":
    """The weight of a layer with the adapter in it, in fp32."""
    from peft.tuners.ia3 import IA3Layer

    weight = layer.get_base_layer().weight.float()
    if isinstance(layer, IA3Layer):  # a column for outputs, a row for inputs
        return weight * _scale(layer)
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).float()
        magnitude = layer.lora_magnitude_vector[adapter] if adapter in layer.lora_magnitude_vector else None
        if magnitude is not None:  # DoRA: the size of each row is learned apart from its direction
            weight = weight * (magnitude.weight.float() / weight.norm(dim=1)).unsqueeze(1)
    return weight


def _scale(layer: Any) -> "torch.Tensor":
    """What an IA3 layer multiplies by."""
    scale = 1.0
    for adapter in layer.active_adapters:
        scale = scale * layer.ia3_l[adapter].float()
    return scale  # type: ignore[return-value]


def _put(layer: Any, part: str, value: "torch.Tensor", *, name: str) -> None:
    """Rounds `value` to the type of the parameter that it replaces."""
    import torch

    parameter = getattr(layer, part)
    rounded = value.to(parameter.dtype)
    if not torch.isfinite(rounded).all():
        raise InvalidConfig(
            reason="MergeNotFinite",
            message=f"the adapter's part of {name} overflows {parameter.dtype}: lower spec.training.learningRate",
        )
    parameter.copy_(rounded)

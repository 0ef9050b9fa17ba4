"""Adds the adapter to the original 16-bit base, and proves that the result answers as base and adapter together do.

Never into the quantized base: that would quantize the sum a second time, and nothing could read it.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve_pipeline.contract import ADAPTER_DIRECTORY, MODEL_DIRECTORY, MergeSpec
from tuneserve_pipeline.errors import InvalidConfig, StageFailure
from tuneserve_pipeline.machine import configure_process
from tuneserve_pipeline.rows import Row, read_rows
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tables import TRAIN_FILE, VALIDATION_FILE
from tuneserve_pipeline.tokenization import Base, copy_tokenizer, end_token_ids, read_base, read_object

if TYPE_CHECKING:
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


def load_model(path: Path) -> "PreTrainedModel":
    """A model in the precision that it is stored in, on the CPU."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    return model


def load_adapted(base: Base, adapter: Path) -> "PeftModel":
    """The original base with the adapter on it; the adapter's own weights in fp32."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(base.path), str(adapter), autocast_adapter_dtype=True)


def merge(model: "PeftModel") -> "PreTrainedModel":
    """The base with the adapter added, each sum taken in fp32 and rounded once.

    PEFT's own merge rounds the adapter's part first and the sum again.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    with torch.no_grad():
        for name, layer in layers:
            weight = layer.get_base_layer().weight
            total = weight.float()
            for adapter in layer.active_adapters:
                total += layer.get_delta_weight(adapter).float()
            total = total.to(weight.dtype)
            if not torch.isfinite(total).all():
                raise InvalidConfig(
                    reason="MergeNotFinite",
                    message=f"the adapter's part of {name} overflows {weight.dtype}: lower spec.training.learningRate",
                )
            weight.copy_(total)
    merged: PreTrainedModel = model.unload()
    return merged


def write_model(model: "PreTrainedModel", *, base: Base, target: Path) -> None:
    """Weights, configuration, tokenizer and template: all that a server needs."""
    from transformers import GenerationConfig

    end = end_token_ids(base)
    # Written as it is below: the library refuses to save what many published generation configs say.
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(target, max_shard_size="4GB")
    copy_tokenizer(base, target)
    generation: dict[str, Any] = {**read_object(base.path / "generation_config.json"), "eos_token_id": end}
    text = json.dumps(generation, indent=2, sort_keys=True) + "\n"
    (target / "generation_config.json").write_text(text, encoding="utf-8")

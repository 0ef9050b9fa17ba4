"""Whole models in files: read as they are stored, and written with all that a server needs beside the weights."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve_pipeline.contract import MODEL_DIRECTORY, Method, TrainSpec
from tuneserve_pipeline.stage import StageRun
from tuneserve_pipeline.tokenization import Base, copy_tokenizer, end_token_ids, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(path: Path) -> "PreTrainedModel":
    """A model in the precision that it is stored in, on the CPU."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    return model


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


def merged_model(job: StageRun) -> Path:
    """The tuned model as a whole: what `merge` made, or, where nothing was to be merged, what `train` put out."""
    told = job.config.inputs
    return job.input("train" if "train" in told and "merge" not in told else "merge") / MODEL_DIRECTORY


def puts_out_model(spec: TrainSpec) -> bool:
    """Whether the training itself puts out a whole model."""
    return spec.method is Method.FULL

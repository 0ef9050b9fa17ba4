"""QLoRA with TRL's trainer: one path for CPU and GPU, and what it must not lose or spend.

Three things are ours: only positions with a label reach the output layer (off a GPU the library projects every token
onto the whole vocabulary, a third of a step), rows of like length come together, and a loss that is no number ends the
run before a checkpoint keeps it.
"""

import dataclasses
import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from tuneserve_pipeline.contract import Scheduler, TrainSpec
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.machine import memory_available
from tuneserve_pipeline.recipe import Recipe, Shape, keeps_activations, row_order
from tuneserve_pipeline.rows import IGNORED, Rows

if TYPE_CHECKING:
    from tuneserve_pipeline.packed.training import PackedSteps

_SCHEDULERS = {
    Scheduler.COSINE: "cosine",
    Scheduler.LINEAR: "linear",
    Scheduler.CONSTANT: "constant_with_warmup",
}


class CompletionTrainer(SFTTrainer):
    """SFTTrainer on rows that are tokens and labels already."""

    def __init__(self, *, lengths: Sequence[int], global_batch_size: int, **given: Any) -> None:
        self._lengths = lengths
        self._global_batch_size = global_batch_size
        self._supervised: torch.Tensor | None = None
        super().__init__(**given)
        self.model.get_base_model().base_model.register_forward_hook(self._keep_supervised)

    def _keep_supervised(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
        if self._supervised is not None:
            outputs.last_hidden_state = outputs.last_hidden_state[self._supervised].unsqueeze(0)
        return outputs

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        # A position predicts the token after it.
        targets = functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        self._supervised = targets != IGNORED
        inputs["shift_labels"] = targets[self._supervised].unsqueeze(0)
        try:
            return super().compute_loss(model, inputs, *arguments, **options)
        finally:
            self._supervised = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The library's way turns bfloat16 adapters into fp32 ones: another course than that of an undisturbed run.
        weights = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        result = set_peft_model_state_dict(self.model if model is None else model, weights)
        if result.unexpected_keys:
            raise ValueError(f"{resume_from_checkpoint} holds weights of another adapter: {result.unexpected_keys[:3]}")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            # torch's writer says neither why nor where it failed.
            if any(sign in str(error) for sign in ("PytorchStreamWriter", "file write failed", "inline_container")):
                raise OSError(errno.ENOSPC, "No space left on device", self.args.output_dir) from error
            raise

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return LikeLengths(lengths=self._lengths, batch=self._global_batch_size, seed=self.args.seed)


class LikeLengths(Sampler[int]):
    """`row_order` for the data loader, which sets the epoch: a resumed run finds the order of the run before it."""

    def __init__(self, *, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = lengths, batch, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(row_order(self._lengths, batch=self._batch, seed=self._seed, epoch=self._epoch))

    def __len__(self) -> int:
        return len(self._lengths)


def load_quantized(path: Path, *, device: str) -> PreTrainedModel:
    """The base in NF4 with double quantization; what is not quantized, and all arithmetic, in bfloat16."""
    # It asks for a package that would fetch compiled code from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        device_map={"": "cuda:0" if device == "cuda" else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model


def make_trainer(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: TrainSpec,
    recipe: Recipe,
    device: str,
    rows: Rows,
    validation: Rows,
    aside: Path,
    callbacks: Sequence[TrainerCallback],
    packed: "PackedSteps | None" = None,
) -> CompletionTrainer:
    """A trainer that writes its checkpoints below `aside`; raises `InvalidConfig` for layers the model lacks.

    `packed`: the steps of rows laid end to end; with them the packed engine computes each step.
    """
    lengths = rows.lengths.tolist()
    layers = linear_layers(model)
    keeps = packed is not None or keeps_activations(
        shape=shape_of(model), tokens=recipe.micro_batch_size * max(lengths), free_bytes=free_memory(device)
    )
    arguments = SFTConfig(
        output_dir=str(aside),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=_SCHEDULERS[spec.scheduler],
        warmup_steps=recipe.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_gradient_norm,
        optim="paged_adamw_8bit",
        seed=spec.seed,
        # Base and adapters are bfloat16 themselves; autocast would only cast them again.
        bf16=False,
        gradient_checkpointing=not keeps,
        max_length=None,  # rows are measured already, and none is cut
        packing=False,
        save_strategy="steps",
        save_steps=spec.checkpoint_steps,
        save_total_limit=None,  # the store removes old ones
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=device == "cuda",
        disable_tqdm=True,
        report_to=[],
        use_cpu=device == "cpu",
    )
    kind: Callable[..., CompletionTrainer] = CompletionTrainer
    if packed is not None:
        from tuneserve_pipeline.packed.training import PackedTrainer, settings

        kind = partial(PackedTrainer, packed=packed)
        arguments = dataclasses.replace(arguments, **settings(longest=max(lengths)))
    try:
        trainer = kind(
            lengths=lengths,
            global_batch_size=spec.global_batch_size,
            model=model,
            args=arguments,
            train_dataset=to_dataset(rows),
            eval_dataset=to_dataset(validation) if validation else None,
            processing_class=tokenizer,
            peft_config=lora_config(spec, layers=layers),
            callbacks=list(callbacks),
        )
    except ValueError as error:
        if spec.lora.target_modules and any(
            sign in str(error) for sign in ("arget modules", "arget_modules", "lm_head")
        ):
            raise InvalidConfig(
                reason="TargetModulesInvalid",
                message=f"spec.lora.targetModules {', '.join(spec.lora.target_modules)}: {error}. The model has these "
                f"linear layers: {', '.join(layers)}",
            ) from error
        raise
    trainer.remove_callback(PrinterCallback)
    return trainer


def lora_config(spec: TrainSpec, *, layers: Sequence[str]) -> LoraConfig:
    """`layers`: names of all linear layers."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.lora.rank,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.dropout,
        # By short names, as servers know them; "all-linear" would list each layer's path.
        target_modules=list(spec.lora.target_modules or layers),
    )


def to_dataset(rows: Rows) -> Dataset:
    return Dataset(rows.to_arrow())


def linear_layers(model: torch.nn.Module) -> list[str]:
    """Names that `targetModules` may hold: the last part of each linear layer's, but for the output layer."""
    output_layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and layer is not output_layer
        }
    )


def shape_of(model: PreTrainedModel) -> Shape:
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    return Shape(layers=int(config.num_hidden_layers), hidden=hidden, intermediate=int(intermediate))


def free_memory(device: str) -> int:
    """Bytes that activations could take."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else memory_available()


def peak_memory() -> int:
    """Bytes that this process has held on the GPU at once, at most."""
    return int(torch.cuda.max_memory_reserved())


def log_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the run logged at each step, without anything that depends on the machine's speed."""
    names = {"loss": "loss", "eval_loss": "evalLoss", "grad_norm": "gradientNorm", "learning_rate": "learningRate"}
    kept = []
    for entry in history:
        values = {name: entry[key] for key, name in names.items() if key in entry}
        if values:
            kept.append({"step": entry["step"], "epoch": round(entry["epoch"], 6), **values})
    return kept

"""Training with TRL's trainers: one path for CPU and GPU, and what it must not lose or spend.

Three things are ours: only positions with a label reach the output layer (off a GPU the library projects every token
onto the whole vocabulary, a third of a step), the rows of a step are the same on any machine, and a checkpoint gives
back exactly what was trained.
"""

import dataclasses
import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as functional
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from tuneserve_pipeline import methods
from tuneserve_pipeline.contract import Method, Scheduler, TrainSpec
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.machine import memory_available
from tuneserve_pipeline.recipe import Recipe, Shape, keeps_activations, micro_batches, step_rows, steps_in_epoch
from tuneserve_pipeline.rows import IGNORED, Rows

if TYPE_CHECKING:
    from tuneserve_pipeline.packed.training import PackedSteps

SCHEDULERS = {
    Scheduler.COSINE: "cosine",
    Scheduler.COSINE_WITH_MINIMUM: "cosine_with_min_lr",
    Scheduler.LINEAR: "linear",
    Scheduler.CONSTANT: "constant_with_warmup",
    Scheduler.INVERSE_SQUARE_ROOT: "inverse_sqrt",
    Scheduler.WARMUP_STABLE_DECAY: "warmup_stable_decay",
}
#: Bytes that a full training adds to each weight: its gradient in fp32, two moments in 8 bits, and its copy in bfloat16
#: while a product is computed.
_FULL_BYTES = 8
#: Share of the highest learning rate at which `CosineWithMinimum` ends.
_MINIMUM_RATE = 0.1


class Steady:
    """What all trainers have in common: the rows of each step, and checkpoints that a run goes on from exactly.

    What the library takes for a batch is a whole optimizer step, a list of micro-batches: their number differs from
    step to step and from machine to machine, and the library would have it the same everywhere.
    """

    def __init__(self, *, setting: "Setting", lengths: Sequence[int], **given: Any) -> None:
        self._setting = setting
        self._lengths = lengths
        super().__init__(**given)

    @staticmethod
    def row_length(row: Mapping[str, Any]) -> int:
        """Tokens that a row takes on the device."""
        return len(row["input_ids"])

    def get_train_dataloader(self) -> DataLoader:
        spec, lengths = self._setting.spec, self._lengths
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=EpochSteps(
                count=steps_in_epoch(spec, lengths=lengths),
                of_epoch=lambda epoch: step_rows(spec, lengths=lengths, epoch=epoch),
            ),
            collate_fn=self._micro_batches,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _micro_batches(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        parts = micro_batches([self.row_length(row) for row in rows], recipe=self._setting.recipe)
        return [self.data_collator([rows[place] for place in part]) for part in parts]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        steps = list(islice(epoch_iterator, num_batches))
        return steps, self._get_num_items_in_batch([micro for step in steps for micro in step], device)

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Any:
        rows = [len(micro["input_ids"]) for micro in inputs]
        losses = []
        for micro, count in zip(inputs, rows, strict=True):
            # A loss that is a mean over rows is divided by this.
            self.current_gradient_accumulation_steps = sum(rows) / count
            losses.append(super().training_step(model, micro, num_items_in_batch))
        return sum(losses)

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        return sum(super(Steady, self).floating_point_ops(micro) for micro in inputs)

    def _track_num_input_tokens(self, inputs: list[dict[str, Any]]) -> None:
        for micro in inputs:
            super()._track_num_input_tokens(micro)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        methods.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:
            # torch's writer says neither why nor where it failed.
            if any(sign in str(error) for sign in ("PytorchStreamWriter", "file write failed", "inline_container")):
                raise OSError(errno.ENOSPC, "No space left on device", self.args.output_dir) from error
            raise


class EpochSteps(Sampler[list[int]]):
    """The steps of the epoch that the trainer has set, each as a batch: a resumed run finds those of the run before it.

    A batch sampler, since that is what the library tells the epoch also when it skips what is done.
    """

    def __init__(self, *, count: int, of_epoch: Callable[[int], list[list[int]]]) -> None:
        self._count, self._of_epoch, self._epoch = count, of_epoch, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._of_epoch(self._epoch))

    def __len__(self) -> int:
        return self._count


class CompletionTrainer(Steady, SFTTrainer):
    """SFTTrainer on rows that are tokens and labels already."""

    def __init__(self, **given: Any) -> None:
        self._supervised: torch.Tensor | None = None
        super().__init__(**given)
        methods.plain_model(self.model).base_model.register_forward_hook(self._keep_supervised)

    def _keep_supervised(self, module: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
        if self._supervised is not None:
            tokens = outputs.last_hidden_state[:, -self._supervised.shape[1] :]  # virtual ones stand before them
            outputs.last_hidden_state = tokens[self._supervised].unsqueeze(0)
        return outputs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # A position predicts the token after it.
        targets = functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        self._supervised = targets != IGNORED
        inputs["shift_labels"] = targets[self._supervised].unsqueeze(0)
        if not self.model.training:
            # The library takes the mean over batches, weighted by their rows; so it is one over tokens, and the
            # same for batches of any size.
            num_items_in_batch = len(targets) * self._tokens_per_row
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._supervised = None

    @cached_property
    def _tokens_per_row(self) -> float:
        """Supervised tokens in a row of the validation data, on average."""
        counts = [sum(label != IGNORED for label in labels[1:]) for labels in self.eval_dataset["labels"]]
        return sum(counts) / len(counts)


Built = TypeVar("Built", bound=Steady)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a training runs, without what it learns from."""

    spec: TrainSpec
    recipe: Recipe
    device: str
    aside: Path
    """Checkpoints are written below it."""
    checkpoint_steps: int
    callbacks: Sequence[TrainerCallback]


def make_trainer(
    setting: Setting,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    validation: Rows,
    packed: "PackedSteps | None" = None,
) -> CompletionTrainer:
    """Raises `InvalidConfig` for layers the model lacks.

    `packed`: the steps of rows laid end to end; with them the packed engine computes each step.
    """
    lengths = rows.lengths.tolist()
    arguments = SFTConfig(
        **common_arguments(setting, model=model, longest=max(lengths), evaluates=bool(validation)),
        max_length=None,  # rows are measured already, and none is cut
        packing=False,
    )
    kind: Callable[..., CompletionTrainer] = CompletionTrainer
    if packed is not None:
        from tuneserve_pipeline.packed.training import PackedTrainer, settings

        kind = partial(PackedTrainer, packed=packed)
        arguments = dataclasses.replace(arguments, **settings(longest=max(lengths)))
    return build(
        kind,
        setting,
        lengths=lengths,
        model=model,
        args=arguments,
        train_dataset=to_dataset(rows),
        eval_dataset=to_dataset(validation) if validation else None,
        processing_class=tokenizer,
    )


def build(kind: Callable[..., Built], setting: Setting, *, model: PreTrainedModel, **given: Any) -> Built:
    """Any of our trainers, with what the method adds to the model; raises `InvalidConfig` for layers it lacks."""
    with told_layers(setting.spec, model=model):
        trainer = kind(
            setting=setting,
            model=model,
            peft_config=methods.adapter_config(setting.spec, model=model),
            callbacks=list(setting.callbacks),
            **given,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def common_arguments(setting: Setting, *, model: PreTrainedModel, longest: int, evaluates: bool) -> dict[str, Any]:
    """Arguments of any of the library's trainers; `longest` is the longest row in tokens."""
    spec, recipe, device = setting.spec, setting.recipe, setting.device
    free = free_memory(device)
    if spec.method is Method.FULL:
        free -= _FULL_BYTES * model.num_parameters()
    keeps = keeps_activations(shape=shape_of(model), tokens=recipe.tokens_at_a_time, free_bytes=free)
    at_a_time = recipe.rows_at_a_time or max(1, recipe.tokens_at_a_time // longest)
    return {
        "output_dir": str(setting.aside),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": at_a_time,
        "per_device_eval_batch_size": at_a_time,
        "gradient_accumulation_steps": 1,  # a batch is a step
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": SCHEDULERS[spec.scheduler],
        "lr_scheduler_kwargs": scheduler_options(spec.scheduler, recipe=recipe),
        "warmup_steps": recipe.warmup_steps,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_gradient_norm,
        "neftune_noise_alpha": spec.neftune_alpha or None,
        "optim": "paged_adamw_8bit",
        "seed": spec.seed,
        # Base and adapters are bfloat16 themselves; autocast would only cast them again. A full training holds the
        # weights in fp32 and computes in bfloat16 where that is faster.
        "bf16": spec.method is Method.FULL and device == "cuda",
        # A prefix takes the place of the cache, which is not there when activations are computed twice.
        "gradient_checkpointing": not keeps and spec.method is not Method.PREFIX_TUNING,
        "eval_strategy": "steps" if evaluates and spec.evaluation_steps else "no",
        "eval_steps": spec.evaluation_steps,
        "save_strategy": "steps",
        "save_steps": setting.checkpoint_steps,
        "save_total_limit": None,  # the store removes old ones
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": device == "cuda",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": device == "cpu",
    }


def scheduler_options(scheduler: Scheduler, *, recipe: Recipe) -> dict[str, Any] | None:
    if scheduler is Scheduler.COSINE_WITH_MINIMUM:
        return {"min_lr_rate": _MINIMUM_RATE}
    if scheduler is Scheduler.WARMUP_STABLE_DECAY:
        return {"num_decay_steps": recipe.decay_steps, "decay_type": "linear"}
    return None


@contextmanager
def told_layers(spec: TrainSpec, *, model: PreTrainedModel) -> Iterator[None]:
    """Turns what the library says of wrong target modules into a sentence with the names of those that there are."""
    layers = methods.linear_layers(model)  # before an adapter is in it
    # The library looks for one that it finds, and leaves out the others without a word.
    paths = [name for name, _ in model.named_modules()]
    missing = [
        wanted
        for wanted in spec.lora.target_modules
        if not any(path == wanted or path.endswith("." + wanted) for path in paths)
    ]
    if missing:
        raise InvalidConfig(
            reason="TargetModulesInvalid",
            message=f"spec.lora.targetModules {', '.join(missing)}: not in the model, which has these linear layers: "
            f"{', '.join(layers)}",
        )
    try:
        yield
    except ValueError as error:
        wanted = spec.lora.target_modules
        if wanted and any(sign in str(error) for sign in ("arget modules", "arget_modules", "lm_head")):
            raise InvalidConfig(
                reason="TargetModulesInvalid",
                message=f"spec.lora.targetModules {', '.join(wanted)}: {error}. The model has these "
                f"linear layers: {', '.join(layers)}",
            ) from error
        raise


def to_dataset(rows: Rows) -> Dataset:
    return Dataset(rows.to_arrow())


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

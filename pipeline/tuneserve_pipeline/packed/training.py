"""The trainer with the packed engine at its core: schedules, checkpoints, resumption and evaluation stay the library's.

An item of its data loader is one optimizer step, all of its batches; so the global batch is what the recipe says,
however many batches it takes, and a resumed run skips steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tuneserve_pipeline.contract import TrainSpec
from tuneserve_pipeline.packed.batches import Row, labels_in, make_batch
from tuneserve_pipeline.packed.engine import Batch, PackedEngine, limits_of
from tuneserve_pipeline.packing import Step, epoch_order, steps_of_rows, steps_of_tokens
from tuneserve_pipeline.trainer import CompletionTrainer, EpochSteps

#: Tokens of an evaluation's batch: it runs beside the memory that the graphs keep.
_EVALUATION_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class PackedStep:
    batches: tuple[Batch, ...]
    tokens: int


class PackedSteps(Dataset[PackedStep]):
    """The steps of an epoch as batches, made when they are asked for."""

    def __init__(self, *, steps: Sequence[Step], rows: Sequence[Row], longest: int, pin: bool) -> None:
        self._steps, self._rows, self._pin = steps, rows, pin
        self.longest = longest
        self._labels = [labels_in(labels) for _, labels in rows]
        packs = [(pack.tokens, sum(self._labels[row] for row in pack.rows)) for step in steps for pack in step]
        self.limits = limits_of(packs)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> PackedStep:
        step = self._steps[index]
        labels = sum(self._labels[row] for pack in step for row in pack.rows)
        return PackedStep(
            batches=tuple(
                make_batch(
                    [self._rows[row] for row in pack.rows],
                    limits=self.limits,
                    longest=self.longest,
                    weight=1.0 / max(1, labels),
                    pin=self._pin,
                )
                for pack in step
            ),
            tokens=sum(pack.tokens for pack in step),
        )


class StepLoader(DataLoader[PackedStep]):
    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, EpochSteps)
        self.batch_sampler.set_epoch(epoch)


class PackedTrainer(CompletionTrainer):
    """`CompletionTrainer` whose steps are computed by a `PackedEngine`."""

    def __init__(self, *, packed: PackedSteps, **given: Any) -> None:
        super().__init__(**given)
        self._steps = packed
        self.engine = PackedEngine(self.model, longest=packed.longest)

    def get_train_dataloader(self) -> DataLoader[PackedStep]:
        return StepLoader(
            self._steps,
            batch_sampler=EpochSteps(
                count=len(self._steps),
                of_epoch=lambda epoch: [
                    [step] for step in epoch_order(len(self._steps), seed=self.args.seed, epoch=epoch)
                ],
            ),
            collate_fn=_only,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Each step knows the weight of its labels."""
        return list(islice(epoch_iterator, num_batches)), None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.engine.begin_step()
        for batch in inputs.batches:
            self.engine.accumulate(batch)
        return self.engine.end_step()

    def _track_num_input_tokens(self, inputs: Any) -> None:
        self.state.num_input_tokens_seen += inputs.tokens

    def floating_point_ops(self, inputs: Any) -> int:
        return 0


def settings(*, longest: int) -> dict[str, Any]:
    """What differs in the trainer's arguments. `longest`: tokens of the longest row."""
    return {
        "gradient_checkpointing": False,  # the engine decides it, layer by layer
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": max(1, _EVALUATION_TOKENS // longest),
        # Few kernels for all adapters, where one of 8 bits takes one for each: more than a step's time on small models.
        "optim": "adamw_torch_fused",
    }


def plan_steps(spec: TrainSpec, *, rows: Sequence[Row], longest: int, tokens: int, pin: bool) -> PackedSteps:
    """The steps of an epoch. `longest`: tokens of the longest row; `tokens`: that the device takes at once."""
    lengths = [len(ids) for ids, _ in rows]
    tokens = max(tokens, longest)
    if spec.global_batch_tokens is not None:
        steps = steps_of_tokens(lengths, step_tokens=spec.global_batch_tokens, device_tokens=tokens, seed=spec.seed)
    else:
        steps = steps_of_rows(lengths, step_rows=spec.global_batch_size, device_tokens=tokens, seed=spec.seed)
    return PackedSteps(steps=steps, rows=rows, longest=longest, pin=pin)


def _only(steps: Sequence[PackedStep]) -> PackedStep:
    return steps[0]

"""Learning from better and worse answers (DPO), with TRL's trainer on rows that are tokens already.

The reference is the base model: with an adapter, what remains when it is off; in a full training, what the base says
of each answer before the first step, so that no second model is in memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from tuneserve_pipeline.contract import Method
from tuneserve_pipeline.trainer import Setting, Steady, build, common_arguments


class Pair(Protocol):
    """A prompt and two answers to it as tokens, each answer up to the token that ends it."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def chosen(self) -> Sequence[int]: ...
    @property
    def rejected(self) -> Sequence[int]: ...


class PreferenceTrainer(Steady, DPOTrainer):
    """DPOTrainer on pairs that are tokens already."""

    @staticmethod
    def row_length(row: Mapping[str, Any]) -> int:
        return 2 * (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any, **options: Any) -> Dataset:
        return dataset


def make_preference_trainer(
    setting: Setting,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
) -> PreferenceTrainer:
    """Raises `InvalidConfig` for layers the model lacks."""
    spec = setting.spec
    lengths = pair_lengths(pairs)
    arguments = DPOConfig(
        **common_arguments(setting, model=model, longest=max(lengths), evaluates=bool(validation)),
        beta=spec.dpo.beta,
        max_length=None,  # pairs are measured already, and none is cut
        disable_dropout=False,  # that of the spec counts
        precompute_ref_log_probs=spec.method is Method.FULL,
    )
    return build(
        PreferenceTrainer,
        setting,
        lengths=lengths,
        model=model,
        args=arguments,
        train_dataset=pairs_to_dataset(pairs),
        eval_dataset=pairs_to_dataset(validation) if validation else None,
        processing_class=tokenizer,
    )


def pair_lengths(pairs: Sequence[Pair]) -> list[int]:
    """Tokens that a pair takes on the device: the prompt with each of its answers, the shorter one filled up."""
    return [2 * (len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))) for pair in pairs]


def pairs_to_dataset(pairs: Sequence[Pair]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [list(pair.prompt) for pair in pairs],
            "chosen_ids": [list(pair.chosen) for pair in pairs],
            "rejected_ids": [list(pair.rejected) for pair in pairs],
        }
    )

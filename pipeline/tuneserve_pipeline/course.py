"""The course of a training, judged by what it logged: which weights are the best, and when to stop. Pure.

Everything follows from the log history, which every checkpoint carries: a resumed run decides as an undisturbed one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from tuneserve_pipeline.contract import EarlyStopping

#: The last steps that are looked at for an explosion.
EXPLOSION_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    step: int
    loss: float
    """Over the tokens of the validation rows."""


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """One for each step that was evaluated, in order."""
    found = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    return [Evaluation(step=step, loss=found[step]) for step in sorted(found)]


def losses(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the training steps."""
    return [float(entry["loss"]) for entry in history if "loss" in entry]


def ends(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of the training steps the first loss and the last ones: all that each step of a long training must look at."""
    first = next((place for place, entry in enumerate(history) if "loss" in entry), None)
    if first is None:
        return []
    behind = islice(reversed(history), len(history) - first - 1)
    last = list(islice((entry for entry in behind if "loss" in entry), EXPLOSION_STEPS))
    return losses([history[first], *reversed(last)])


def best(found: Sequence[Evaluation]) -> Evaluation | None:
    """The lowest loss, the earliest of equal ones."""
    return min(found, key=lambda evaluation: (evaluation.loss, evaluation.step), default=None)


def is_exhausted(found: Sequence[Evaluation], *, stopping: EarlyStopping | None) -> bool:
    """Whether the loss has not improved for as long as `stopping` has patience."""
    if stopping is None or not found:
        return False
    lowest, waited = found[0].loss, 0
    for evaluation in found[1:]:
        if evaluation.loss < lowest - stopping.minimum_improvement:
            lowest, waited = evaluation.loss, 0
        else:
            waited += 1
    return waited >= stopping.patience


def has_exploded(found: Sequence[float]) -> bool:
    """Whether the training has forgotten more than it began with: most of the last steps are far above the first.

    A bad batch is a step or two; what diverges stays up, at a loss that is finite but says that nothing is left.
    """
    last = found[1:][-EXPLOSION_STEPS:]
    return len(last) == EXPLOSION_STEPS and median(last) > 2 * found[0] + 1


def final_loss(found: Sequence[float]) -> float:
    """Mean over the last tenth of the steps: that of the last step alone is its rows' luck."""
    last = found[-max(1, len(found) // 10) :]
    return sum(last) / len(last)


def log_of(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the run logged at each step, without anything that depends on the machine's speed."""
    names = {
        "loss": "loss",
        "eval_loss": "evalLoss",
        "rewards/accuracies": "rewardAccuracy",
        "eval_rewards/accuracies": "evalRewardAccuracy",
        "rewards/margins": "rewardMargin",
        "grad_norm": "gradientNorm",
        "learning_rate": "learningRate",
    }
    kept = []
    for entry in history:
        values = {name: entry[key] for key, name in names.items() if key in entry}
        if values:
            kept.append({"step": entry["step"], "epoch": round(entry["epoch"], 6), **values})
    return kept

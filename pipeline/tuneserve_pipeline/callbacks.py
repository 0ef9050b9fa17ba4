"""What happens beside each training step: progress, checkpoints, the wish to stop, and a loss that says it failed."""

import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuneserve_pipeline import course
from tuneserve_pipeline.checkpoints import CheckpointStore
from tuneserve_pipeline.contract import EarlyStopping
from tuneserve_pipeline.errors import Interrupted, InvalidConfig
from tuneserve_pipeline.metrics import Progress

log = logging.getLogger(__name__)
#: Seconds between two lines about the training in the log.
LOG_SECONDS = 10.0


class ProgressReporter(TrainerCallback):
    """Tells each step's figures, and ends a run whose loss is lost before a checkpoint is made of it."""

    def __init__(self, progress: Progress, *, store: CheckpointStore) -> None:
        self._progress = progress
        self._store = store
        self._began: tuple[float, float] | None = None
        self._logged = -LOG_SECONDS
        self.tokens_per_second: float | None = None
        """Without padding, since the end of the first step, which also compiles and finds its memory."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self._began = None
        self._progress.update(step=state.global_step, total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **given: Any,
    ) -> None:
        if logs and not math.isfinite(logs.get("eval_loss", 0.0)):
            raise self._lost(args, state, reason="LossNotFinite", what=f"the validation loss is {logs['eval_loss']}")
        if not logs or "loss" not in logs:
            return
        step, loss, norm = state.global_step, float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        rate = float(logs["learning_rate"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"the loss is {loss} and the gradient norm {norm}"
            raise self._lost(args, state, reason="LossNotFinite", what=what)
        found = course.ends(state.log_history)
        if course.has_exploded(found):
            what = f"the loss has exploded: it began at {found[0]:.3g} and is {loss:.3g}"
            raise self._lost(args, state, reason="LossExploded", what=what)
        now, seen = time.monotonic(), float(state.num_input_tokens_seen)
        if self._began is None:
            self._began = (now, seen)
        since, tokens = self._began
        if seen > tokens:
            self.tokens_per_second = (seen - tokens) / max(now - since, 1e-6)
        self._progress.update(
            step=step,
            total=state.max_steps,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            tokens_per_second=self.tokens_per_second,
        )
        if now - self._logged >= LOG_SECONDS or step == state.max_steps:
            self._logged = now
            log.info(
                "step %d of %d: loss %.4f, %.0f tokens/s", step, state.max_steps, loss, self.tokens_per_second or 0
            )

    def _lost(self, args: TrainingArguments, state: TrainerState, *, reason: str, what: str) -> InvalidConfig:
        saved = self._store.steps()
        kept = f". The checkpoint of step {saved[0]} is kept at {self._store.directory}" if saved else ""
        return InvalidConfig(
            reason=reason,
            message=f"{what} at step {state.global_step} of {state.max_steps} (learning rate {args.learning_rate:g}): "
            f"lower spec.training.learningRate, or lengthen the warm-up{kept}",
        )


class CheckpointKeeper(TrainerCallback):
    """Seals each checkpoint that the trainer wrote, and never lets go of that of the lowest validation loss.

    On a signal, and when the loss falls no more, it has one written at the end of the step, and stops.
    """

    def __init__(
        self, *, store: CheckpointStore, interrupted: threading.Event, stopping: EarlyStopping | None = None
    ) -> None:
        self._store = store
        self._interrupted = interrupted
        self._stopping = stopping
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self._training = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._training = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> TrainerControl:
        if self._interrupted.is_set():
            control.should_save = True
            control.should_training_stop = True
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True  # the last weights may be the best, whatever the interval
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> TrainerControl:
        if not self._training:
            return control
        found = course.evaluations(state.log_history)
        lowest = course.best(found)
        if lowest is not None and lowest.step == state.global_step:
            control.should_save = True
        if course.is_exhausted(found, stopping=self._stopping):
            log.info("the validation loss improves no more: step %d is the last", state.global_step)
            control.should_save = control.should_training_stop = True
        if self._interrupted.is_set():
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        lowest = course.best(course.evaluations(state.log_history))
        self._store.seal(written, step=state.global_step, spare=lowest.step if lowest else None)
        log.info("checkpoint of step %d of %d is saved", state.global_step, state.max_steps)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        # All steps are done and saved: only what follows them is done again.
        if self._interrupted.is_set() and not self._training:
            raise Interrupted

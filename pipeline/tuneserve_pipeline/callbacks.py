"""What happens beside each training step: progress, checkpoints, the wish to stop, and a loss that is no number."""

import logging
import math
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuneserve_pipeline.checkpoints import CheckpointStore
from tuneserve_pipeline.errors import Interrupted, InvalidConfig
from tuneserve_pipeline.metrics import Progress

log = logging.getLogger(__name__)
#: Seconds between two lines about the training in the log.
LOG_SECONDS = 10.0


class ProgressReporter(TrainerCallback):
    """Tells each step's figures, and stops a run whose loss is not finite before a checkpoint is made of it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
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
        if not logs or "loss" not in logs:
            return
        step, loss, norm = state.global_step, float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        rate = float(logs["learning_rate"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InvalidConfig(
                reason="LossNotFinite",
                message=f"the loss is {loss} and the gradient norm {norm} at step {step} of {state.max_steps} "
                f"(learning rate {args.learning_rate:g}): lower spec.training.learningRate, or lengthen the warm-up",
            )
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


class CheckpointKeeper(TrainerCallback):
    """Seals each checkpoint that the trainer wrote; on a signal has one written at the end of the step, and stops."""

    def __init__(self, *, store: CheckpointStore, interrupted: threading.Event) -> None:
        self._store = store
        self._interrupted = interrupted

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> TrainerControl:
        if self._interrupted.is_set():
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._store.seal(written, step=state.global_step)
        log.info("checkpoint of step %d of %d is saved", state.global_step, state.max_steps)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        # All steps are done and saved: only what follows them is done again.
        if self._interrupted.is_set():
            raise Interrupted

"""QLoRA: learns an adapter on the base in 4 bits, resumes from its last complete checkpoint, and leaves the adapter.

What a run puts out depends on its inputs alone: the same on one machine, whether it was interrupted or not.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve_pipeline.checkpoints import Checkpoint, CheckpointStore
from tuneserve_pipeline.contract import ADAPTER_DIRECTORY, TrainSpec
from tuneserve_pipeline.errors import Interrupted, InvalidConfig
from tuneserve_pipeline.machine import configure_process
from tuneserve_pipeline.recipe import make_recipe
from tuneserve_pipeline.rows import Rows, read_rows
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tables import TRAIN_FILE, VALIDATION_FILE
from tuneserve_pipeline.tokenization import Base, copy_tokenizer, load_tokenizer, read_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tuneserve_pipeline.packed.training import PackedSteps
    from tuneserve_pipeline.trainer import CompletionTrainer

log = logging.getLogger(__name__)

RESUMES = True
LOG_FILE = "trainer_log.jsonl"
#: Rows of the validation split that the loss at the end is taken over: enough to compare runs, and soon done.
EVALUATION_ROWS = 64
#: Tokens that go through the device at once when rows lie end to end. On a GPU products are saturated from here on.
PACKED_TOKENS = {"cpu": 1024, "cuda": 4096}


def run(job: StageRun) -> StageResult:
    spec = job.spec
    assert isinstance(spec, TrainSpec)
    configure_process()
    prepared = job.input("prepare")
    model = read_base(prepared)
    rows = read_rows(prepared / TRAIN_FILE, longest=spec.max_sequence_length)
    validation = read_rows(prepared / VALIDATION_FILE, limit=EVALUATION_ROWS)
    return _train(job, spec=spec, model=model, rows=rows, validation=validation)


def _train(job: StageRun, *, spec: TrainSpec, model: Base, rows: Rows, validation: Rows) -> StageResult:
    # Late: a wrong row is told before the seconds that these take.
    from tuneserve_pipeline import trainer as training
    from tuneserve_pipeline.callbacks import CheckpointKeeper, ProgressReporter

    device = job.config.runtime.device
    lengths = rows.lengths.tolist()
    store = CheckpointStore(directory=job.partial / "checkpoints", keep=spec.checkpoint_keep)
    checkpoint = store.newest()
    reporter = ProgressReporter(job.progress)
    _check_device(device)
    quantized = training.load_quantized(model.path, device=device)
    packed = _packed_steps(quantized, spec=spec, rows=rows, device=device)
    recipe = make_recipe(
        spec,
        lengths=lengths,
        device=device,
        micro_batch_size=job.config.runtime.micro_batch_size,
        epoch_steps=None if packed is None else len(packed),
    )
    trainer = training.make_trainer(
        model=quantized,
        tokenizer=load_tokenizer(model),
        spec=spec,
        recipe=recipe,
        device=device,
        rows=rows,
        validation=validation,
        aside=store.aside,
        callbacks=[reporter, CheckpointKeeper(store=store, interrupted=job.interrupted)],
        packed=packed,
    )
    if packed is None:
        log.info(
            "%d rows, %d steps of %d rows (%d at a time), activations are %s",
            len(rows),
            recipe.steps,
            spec.global_batch_size,
            recipe.micro_batch_size,
            "computed twice" if trainer.args.gradient_checkpointing else "kept",
        )
    else:
        log.info("%d rows, %d steps of %.0f tokens, end to end", len(rows), recipe.steps, sum(lengths) / len(packed))
    if job.interrupted.is_set():  # while the model was loaded: nothing is lost
        raise Interrupted
    _run_steps(trainer, checkpoint=checkpoint, steps=recipe.steps)
    if job.interrupted.is_set():
        raise Interrupted
    metrics = {"loss": final_loss([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])}
    if validation:
        metrics["evalLoss"] = float(trainer.evaluate()["eval_loss"])
    if reporter.tokens_per_second is not None:
        metrics["tokensPerSecond"] = round(reporter.tokens_per_second, 1)
    if device == "cuda":
        metrics["peakMemoryGiB"] = round(training.peak_memory() / 2**30, 2)
    write_adapter(trainer, model=model, target=job.partial / ADAPTER_DIRECTORY)
    _write_log(training.log_of(trainer.state.log_history), job.partial / LOG_FILE)
    store.remove()
    return StageResult(
        metrics=metrics,
        facts={
            "steps": str(trainer.state.global_step),
            "resumedFromStep": str(checkpoint.step if checkpoint else 0),
            "tokens": str(int(trainer.state.num_input_tokens_seen)),
        },
    )


def _packed_steps(model: "PreTrainedModel", *, spec: TrainSpec, rows: Rows, device: str) -> "PackedSteps | None":
    """The steps of rows laid end to end; none where rows are padded."""
    if spec.packing == "Never" or (spec.packing == "Auto" and device == "cpu"):
        return None
    from tuneserve_pipeline import trainer as training
    from tuneserve_pipeline.packed.training import plan_steps
    from tuneserve_pipeline.packed.weights import unsupported

    longest = int(rows.lengths.max())
    adapted = spec.lora.target_modules or training.linear_layers(model)
    reason = unsupported(model, adapted=adapted, dropout=spec.lora.dropout, longest=longest)
    if reason is None:
        return plan_steps(
            spec,
            rows=rows.arrays(),
            longest=longest,
            tokens=PACKED_TOKENS[device],
            pin=device == "cuda",
        )
    if spec.packing == "Always":
        raise InvalidConfig(
            reason="PackingImpossible",
            message=f"spec.training.packing is Always, but {reason}: set it to Auto or Never",
        )
    log.info("rows are padded, not packed: %s", reason)
    return None


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig(
            reason="DeviceMissing",
            message="the profile promises a CUDA GPU, and this pod sees none: correct the profile's resource and "
            "runtimeClassName, or choose another one in spec.accelerator.profile",
        )


def _run_steps(trainer: "CompletionTrainer", *, checkpoint: Checkpoint | None, steps: int) -> None:
    from transformers import TrainerState

    if checkpoint is None:
        trainer.train()
        return
    log.info("resuming from the checkpoint of step %d of %d", checkpoint.step, steps)
    if checkpoint.step < steps:
        trainer.train(resume_from_checkpoint=str(checkpoint.path))
        return
    # The library would train one step too many: all that is missing is what follows the steps.
    trainer._load_from_checkpoint(str(checkpoint.path))
    trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))


def final_loss(losses: list[float]) -> float:
    """Mean over the last tenth of the steps: that of the last step alone is its rows' luck."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def write_adapter(trainer: "CompletionTrainer", *, model: Base, target: Path) -> None:
    """Adapter as PEFT reads it, tokenizer and template; the same bytes for the same weights."""
    shutil.rmtree(target, ignore_errors=True)
    trainer.model.save_pretrained(target, safe_serialization=True, save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)  # the library's model card, full of blanks
    path = target / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": model.name, "revision": model.revision or None}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # a set in the library: in another order in each process
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(model, target)


def _write_log(entries: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")

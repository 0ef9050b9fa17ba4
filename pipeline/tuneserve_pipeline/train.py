"""Learns by the method of the spec, resumes from its last complete checkpoint, and leaves an adapter or a whole model.

What a run puts out depends on its inputs alone: the same on one machine, whether it was interrupted or not.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneserve_pipeline import course, models
from tuneserve_pipeline.checkpoints import Checkpoint, CheckpointStore
from tuneserve_pipeline.contract import ADAPTER_DIRECTORY, MODEL_DIRECTORY, Method, Objective, Packing, TrainSpec
from tuneserve_pipeline.errors import Interrupted, InvalidConfig, StageFailure
from tuneserve_pipeline.machine import configure_process, lacks_for_triton
from tuneserve_pipeline.recipe import make_recipe
from tuneserve_pipeline.rows import Preferences, Rows, read_preferences, read_rows
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tables import TRAIN_FILE, VALIDATION_FILE
from tuneserve_pipeline.tokenization import Base, copy_tokenizer, load_tokenizer, read_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tuneserve_pipeline.packed.training import PackedSteps
    from tuneserve_pipeline.preferences import PreferenceTrainer
    from tuneserve_pipeline.trainer import CompletionTrainer

    AnyTrainer = CompletionTrainer | PreferenceTrainer

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
    read = read_preferences if spec.objective is Objective.DPO else read_rows
    rows = read(prepared / TRAIN_FILE, longest=spec.max_sequence_length)
    validation = read(prepared / VALIDATION_FILE, limit=EVALUATION_ROWS)
    if spec.evaluation_steps and not validation:
        raise InvalidConfig(
            reason="NoValidationRows",
            message="spec.training.evaluationSteps: there are no validation rows to take a loss over; give sources in "
            "spec.dataset.validation, raise spec.dataset.split.validation, or leave evaluationSteps out",
        )
    return _train(job, spec=spec, model=model, rows=rows, validation=validation)


def _train(
    job: StageRun,
    *,
    spec: TrainSpec,
    model: Base,
    rows: Rows | Preferences,
    validation: Rows | Preferences,
) -> StageResult:
    # Late: a wrong row is told before the seconds that these take.
    from tuneserve_pipeline import methods
    from tuneserve_pipeline import trainer as training
    from tuneserve_pipeline.callbacks import CheckpointKeeper, ProgressReporter
    from tuneserve_pipeline.preferences import make_preference_trainer, pair_lengths

    runtime = job.config.runtime
    lengths = pair_lengths(rows) if isinstance(rows, Preferences) else rows.lengths.tolist()
    store = CheckpointStore(directory=job.partial / "checkpoints", keep=runtime.checkpoints.keep)
    checkpoint = resumable(store)
    reporter = ProgressReporter(job.progress, store=store)
    keeper = CheckpointKeeper(store=store, interrupted=job.interrupted, stopping=spec.early_stopping)
    _check_device(runtime.device)
    base = methods.load_base(model.path, spec=spec, device=runtime.device)
    packed = _packed_steps(base, spec=spec, rows=rows, device=runtime.device)
    recipe = make_recipe(
        spec,
        lengths=lengths,
        device=runtime.device,
        micro_batch_size=runtime.micro_batch_size,
        epoch_steps=None if packed is None else len(packed),
    )
    setting = training.Setting(
        spec=spec,
        recipe=recipe,
        device=runtime.device,
        aside=store.aside,
        checkpoint_steps=runtime.checkpoints.steps,
        callbacks=[reporter, keeper],
    )
    trainer: AnyTrainer
    if isinstance(rows, Preferences):
        trainer = make_preference_trainer(
            setting, model=base, tokenizer=load_tokenizer(model), pairs=rows, validation=validation
        )
    else:
        trainer = training.make_trainer(
            setting, model=base, tokenizer=load_tokenizer(model), rows=rows, validation=validation, packed=packed
        )
    if packed is None:
        log.info(
            "%d rows, %d steps of %s, up to %d tokens at a time, activations are %s",
            len(rows),
            recipe.steps,
            f"{spec.global_batch_tokens} tokens" if spec.global_batch_tokens else f"{spec.global_batch_size} rows",
            recipe.tokens_at_a_time,
            "computed twice" if trainer.args.gradient_checkpointing else "kept",
        )
    else:
        log.info("%d rows, %d steps of %.0f tokens, end to end", len(rows), recipe.steps, sum(lengths) / len(packed))
    if job.interrupted.is_set():  # while the model was loaded: nothing is lost
        raise Interrupted
    _run_steps(trainer, spec=spec, checkpoint=checkpoint, steps=recipe.steps)
    history = trainer.state.log_history
    if job.interrupted.is_set():
        raise Interrupted
    metrics = {"loss": course.final_loss(course.losses(history))}
    lowest = course.best(course.evaluations(history))
    if lowest is not None:
        _restore(trainer, lowest, store=store)
        metrics["evalLoss"] = lowest.loss
    elif validation:
        metrics["evalLoss"] = float(trainer.evaluate()["eval_loss"])
    if reporter.tokens_per_second is not None:
        metrics["tokensPerSecond"] = round(reporter.tokens_per_second, 1)
    if runtime.device == "cuda":
        metrics["peakMemoryGiB"] = round(training.peak_memory() / 2**30, 2)
    if models.puts_out_model(spec):
        write_full(trainer, base=model, target=job.partial / MODEL_DIRECTORY)
    else:
        write_adapter(trainer, model=model, target=job.partial / ADAPTER_DIRECTORY)
    _write_log(course.log_of(trainer.state.log_history), job.partial / LOG_FILE)
    store.remove()
    facts = {
        "steps": str(trainer.state.global_step),
        "resumedFromStep": str(checkpoint.step if checkpoint else 0),
        "tokens": str(int(trainer.state.num_input_tokens_seen)),
    }
    if lowest is not None:
        facts["bestStep"] = str(lowest.step)
    return StageResult(metrics=metrics, facts=facts)


def resumable(store: CheckpointStore) -> Checkpoint | None:
    """The newest checkpoint that is whole, and whose best weights are there too."""
    while (newest := store.newest()) is not None:
        lowest = course.best(course.evaluations(_history(newest)))
        if lowest is None or lowest.step == newest.step or store.at(lowest.step) is not None:
            return newest
        log.warning("the checkpoint of step %d is removed: that of step %d is lost", newest.step, lowest.step)
        shutil.rmtree(newest.path)
    return None


def _history(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    state = json.loads((checkpoint.path / "trainer_state.json").read_text(encoding="utf-8"))
    return list(state["log_history"])


def _packed_steps(
    model: "PreTrainedModel", *, spec: TrainSpec, rows: Rows | Preferences, device: str
) -> "PackedSteps | None":
    """The steps of rows laid end to end; none where rows are padded."""
    if spec.packing is Packing.NEVER or (spec.packing is Packing.AUTO and device == "cpu"):
        return None
    from tuneserve_pipeline import methods
    from tuneserve_pipeline.packed.training import plan_steps
    from tuneserve_pipeline.packed.weights import unsupported

    longest = int(rows.lengths.max())
    adapted = spec.lora.target_modules or methods.linear_layers(model)
    reason = _unpackable(spec, device=device) or unsupported(
        model, adapted=adapted, dropout=spec.lora.dropout, longest=longest
    )
    if reason is None and isinstance(rows, Rows):
        return plan_steps(
            spec,
            rows=rows.arrays(),
            longest=longest,
            tokens=PACKED_TOKENS[device],
            pin=device == "cuda",
        )
    if spec.packing is Packing.ALWAYS:
        raise InvalidConfig(
            reason="PackingImpossible",
            message=f"spec.training.packing is Always, but {reason}: set it to Auto or Never",
        )
    log.info("rows are padded, not packed: %s", reason)
    return None


def _unpackable(spec: TrainSpec, *, device: str) -> str | None:
    """What of the spec the packed layers do not compute, and what the image lacks for it."""
    if spec.method is not Method.QLORA:
        return f"the method is {spec.method}"
    if spec.objective is not Objective.SFT:
        return f"the objective is {spec.objective}"
    if spec.lora.weight_decomposed:
        return "lora.weightDecomposed is set"
    if spec.neftune_alpha:
        return "neftuneAlpha is set"
    if device == "cuda" and (missing := lacks_for_triton()) is not None:
        return f"the image has no {missing}, without which Triton cannot start its kernels"
    return None


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidConfig(
            reason="DeviceMissing",
            message="the profile promises a CUDA GPU, and this pod sees none: correct the profile's resource and "
            "runtimeClassName, or choose another one in spec.accelerator.profile",
        )


def _run_steps(trainer: "AnyTrainer", *, spec: TrainSpec, checkpoint: Checkpoint | None, steps: int) -> None:
    from transformers import TrainerState

    if checkpoint is None:
        trainer.train()
        return
    log.info("resuming from the checkpoint of step %d of %d", checkpoint.step, steps)
    found = course.evaluations(_history(checkpoint))
    if checkpoint.step < steps and not course.is_exhausted(found, stopping=spec.early_stopping):
        trainer.train(resume_from_checkpoint=str(checkpoint.path))
        return
    # The library would train one step too many: all that is missing is what follows the steps.
    trainer._load_from_checkpoint(str(checkpoint.path))
    trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))


def _restore(trainer: "AnyTrainer", lowest: course.Evaluation, *, store: CheckpointStore) -> None:
    """Puts back the weights of the lowest validation loss, unless they are those of the last step."""
    if lowest.step == trainer.state.global_step:
        return
    checkpoint = store.at(lowest.step)
    if checkpoint is None:
        raise StageFailure(
            reason="CheckpointDamaged",
            message=f"the checkpoint of step {lowest.step}, the best one, cannot be read back from the volume: run "
            "the stage again, it goes on from the one before",
        )
    log.info("the weights of step %d are put out: their validation loss is the lowest", lowest.step)
    trainer._load_from_checkpoint(str(checkpoint.path))


def write_adapter(trainer: "AnyTrainer", *, model: Base, target: Path) -> None:
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


def write_full(trainer: "AnyTrainer", *, base: Base, target: Path) -> None:
    """The trained model in the number type of its base, ready for a server."""
    import torch
    from transformers import AutoConfig

    shutil.rmtree(target, ignore_errors=True)
    stored = AutoConfig.from_pretrained(base.path, trust_remote_code=False).dtype or torch.bfloat16
    rounded = trainer.model.to(stored)
    wrong = next((name for name, value in rounded.named_parameters() if not torch.isfinite(value).all()), None)
    if wrong is not None:
        raise InvalidConfig(
            reason="WeightsNotFinite",
            message=f"the trained weights of {wrong} overflow {stored}: lower spec.training.learningRate",
        )
    models.write_model(rounded, base=base, target=target)


def _write_log(entries: list[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")

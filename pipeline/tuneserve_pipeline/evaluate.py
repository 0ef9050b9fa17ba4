"""Generates answers for the test rows and scores them.

What is measured is what a server would serve: the target's own tokenizer and chat template, the number type of the
server (float32 on a CPU, bfloat16 on a GPU), greedy generation to the end of turn.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneserve_pipeline import likelihood, prepare
from tuneserve_pipeline.base import context_length
from tuneserve_pipeline.contract import (
    ADAPTER_DIRECTORY,
    ClassificationTask,
    EvaluateSpec,
    EvaluationTarget,
)
from tuneserve_pipeline.encoding import text_ids
from tuneserve_pipeline.errors import InvalidConfig, InvalidData, StageFailure
from tuneserve_pipeline.generation import Answer, Limits, generate, virtual_tokens
from tuneserve_pipeline.metrics import Progress
from tuneserve_pipeline.models import merged_model
from tuneserve_pipeline.scores import Scores, match_label, score_classification, score_instruction
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tokenization import read_base, read_object
from tuneserve_pipeline.tokenized import cut

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
PREDICTIONS_FILE = "predictions.jsonl"
SAMPLES_FILE = "samples.json"
SAMPLES = 10

#: Rows at a time unless the plan says otherwise; more is no faster on a CPU.
_BATCH_SIZE = 64
#: Tokens beyond the longest label or answer: room for the end of turn, and for a long answer to show that it is one.
_SLACK = 4
_LONGEST_ANSWER = 512


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loaded model with the tokenizer and the template that are served with it."""

    model: Any
    tokenizer: Any
    end_ids: frozenset[int]
    cache: Any = None
    """What stands before every prompt in the model's cache: learned virtual tokens; None where there are none."""


def run(job: StageRun) -> StageResult:
    spec = job.spec
    assert isinstance(spec, EvaluateSpec)
    prepared = job.input("prepare")
    rows = read_test_rows(prepared / prepare.TEST_FILE, limit=spec.max_samples)
    labels = read_labels(prepared)
    target = load_target(job, spec.target, prepared=prepared)
    if "text" in rows[0]:
        return _run_texts(job, spec=spec, rows=rows, target=target, prepared=prepared)
    texts = [_render(target, row["prompt"]) for row in rows]
    prompts = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [str(row["completion"][0]["content"]) for row in rows]
    limits = Limits(
        max_new_tokens=_answer_limit(target.tokenizer, labels or expected),
        batch_size=job.config.runtime.micro_batch_size or _BATCH_SIZE,
        end_ids=target.end_ids,
        pad_id=target.tokenizer.pad_token_id if target.tokenizer.pad_token_id is not None else min(target.end_ids),
    )
    found = generate(
        target.model, prompts, limits=limits, done=_reporter(job.progress, len(rows)), virtual=target.cache
    )
    answers = [target.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in found]
    scores = (
        score_classification(expected=expected, answers=answers, labels=labels)
        if labels
        else score_instruction(expected=expected, answers=answers)
    )
    predictions = [
        _prediction(row, text=text, expected=want, answer=have, generated=answer, labels=labels)
        for row, text, want, have, answer in zip(rows, texts, expected, answers, found, strict=True)
    ]
    _write(
        job.partial, spec=spec, scores=scores, predictions=predictions, settings={"maxNewTokens": limits.max_new_tokens}
    )
    return StageResult(metrics=scores.metrics, facts={"target": spec.target.value})


def _run_texts(
    job: StageRun, *, spec: EvaluateSpec, rows: Sequence[dict[str, Any]], target: Target, prepared: Path
) -> StageResult:
    """Plain texts have no answers: what is measured is how well each token is foreseen."""
    base = read_base(prepared)
    limit = min(context_length(read_object(base.path / "config.json")) or likelihood.PIECE, likelihood.PIECE)
    texts = [text_ids(row["text"], tokenizer=base.tokenizer) for row in rows]
    pieces = [[piece for piece in cut(ids, limit) if len(piece) > 1] for ids in texts]
    found = likelihood.foresee(target.model, pieces, done=_reporter(job.progress, len(rows)))
    if not any(one.tokens for one in found):
        raise InvalidData(
            reason="NoTestTokens", message="the test rows are single tokens: nothing of them can be foreseen"
        )
    scores = likelihood.score(found)
    predictions = [
        {"text": row["text"], "tokens": one.tokens, "hits": one.hits, "loss": one.loss, "source": row["source"]}
        for row, one in zip(rows, found, strict=True)
    ]
    _write(job.partial, spec=spec, scores=scores, predictions=predictions, settings={"pieceTokens": limit})
    return StageResult(metrics=scores.metrics, facts={"target": spec.target.value})


def read_test_rows(path: Path, *, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` test rows: `prepare` has put them in no order that says anything about them."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return rows if limit is None else rows[:limit]


def read_labels(prepared: Path) -> tuple[str, ...]:
    """The labels of a classification, in the order of the spec; empty for another task."""
    manifest = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))
    task = manifest["config"]["spec"]["task"]
    return ClassificationTask.model_validate(task).labels if task["kind"] == "classification" else ()


def load_target(job: StageRun, target: EvaluationTarget, *, prepared: Path) -> Target:
    """Load what is measured on the stage's device, with what is served beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    # A log holds lines, and progress goes out as metrics.
    disable_progress_bar()  # type: ignore[no-untyped-call]
    device = job.config.runtime.device
    if device == "cuda" and not torch.cuda.is_available():
        raise StageFailure(
            reason="GpuMissing",
            message="the stage is to run on a GPU and sees none: check the profile's resource, its runtime class and "
            "the driver of the node",
        )
    base = Path(json.loads((prepared / prepare.BASE_FILE).read_text(encoding="utf-8"))["path"])
    if target is not EvaluationTarget.MERGED and not base.is_dir():
        raise InvalidConfig(
            reason="BaseModelNotFound", message=f"the base model is not at {base} any more: mount it again"
        )
    if target is EvaluationTarget.MERGED:
        weights = served = merged_model(job)
    else:
        weights = base
        served = job.input("train") / ADAPTER_DIRECTORY if target is EvaluationTarget.ADAPTER else base
    tokenizer = AutoTokenizer.from_pretrained(served, trust_remote_code=False)
    if target is EvaluationTarget.BASE:
        tokenizer.chat_template = (prepared / prepare.TEMPLATE_FILE).read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(
        weights,
        # The server computes in float32 on a CPU, and its answers must be these.
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model = model.to(device)
    generation_config = model.generation_config
    cache: Any = None
    if target is EvaluationTarget.ADAPTER:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, str(served))
        model, cache = virtual_tokens(adapted) if adapted.active_peft_config.is_prompt_learning else (adapted, None)
    told = generation_config.eos_token_id
    ids = set(told if isinstance(told, list) else [told] if told is not None else [])
    ids.update([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
    return Target(model=model.eval(), tokenizer=tokenizer, end_ids=frozenset(ids), cache=cache)


def _render(target: Target, prompt: Sequence[dict[str, str]]) -> str:
    return str(target.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def _answer_limit(tokenizer: Any, texts: Sequence[str]) -> int:
    """Tokens that an answer may have."""
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return min(longest + _SLACK, _LONGEST_ANSWER)


def _reporter(progress: Progress, total: int) -> Any:
    started, rows, tokens = time.monotonic(), 0, 0
    progress.update(step=0, total=total)

    def done(more_rows: int, more_tokens: int) -> None:
        nonlocal rows, tokens
        rows, tokens = rows + more_rows, tokens + more_tokens
        speed = tokens / max(time.monotonic() - started, 1e-9)
        progress.update(step=rows, total=total, tokens_per_second=speed)
        log.info("%d of %d rows", rows, total)

    return done


def _prediction(
    row: dict[str, Any], *, text: str, expected: str, answer: str, generated: Answer, labels: Sequence[str]
) -> dict[str, Any]:
    prediction = {
        "messages": row["prompt"],
        "prompt": text,
        "expected": expected,
        "answer": answer,
        "ended": generated.ended,
        "source": row["source"],
    }
    return prediction | {"label": match_label(answer, labels)} if labels else prediction


def _write(
    directory: Path,
    *,
    spec: EvaluateSpec,
    scores: Scores,
    predictions: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    with (directory / PREDICTIONS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
    step = max(1, len(predictions) // SAMPLES)
    content = {
        METRICS_FILE: {
            "target": spec.target.value,
            "metrics": dict(scores.metrics),
            "details": dict(scores.details),
            **settings,
        },
        SAMPLES_FILE: list(predictions[::step][:SAMPLES]),
    }
    for name, value in content.items():
        (directory / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

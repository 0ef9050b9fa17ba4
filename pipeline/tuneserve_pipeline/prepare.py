"""Fetches and checks the base model and the data, and tokenizes and splits the rows: all without a GPU.

What is wrong with the input is found here, before anything expensive starts. Must import no torch.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from tuneserve_pipeline import base, dataset, output, templates
from tuneserve_pipeline.base import BaseModel
from tuneserve_pipeline.contract import ClassificationTask, HubModel, LocalModel, PrepareSpec
from tuneserve_pipeline.dataset import Given, Plan, Problems, Rows
from tuneserve_pipeline.encoding import Encoder
from tuneserve_pipeline.errors import InvalidConfig, InvalidData
from tuneserve_pipeline.hub import Hub
from tuneserve_pipeline.report import Kept, LabelTokens, brief, build_report
from tuneserve_pipeline.sources import find_files
from tuneserve_pipeline.splits import Side
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tasks import check_task
from tuneserve_pipeline.templates import Template, Tokenizer
from tuneserve_pipeline.tokenized import FILES, TEST_FILE, Tokenized, tokenize

log = logging.getLogger(__name__)

REPORT_FILE = "report.json"
BASE_FILE = "base.json"
TEMPLATE_FILE = "chat_template.jinja"
#: Characters of the warnings that the outcome carries; the report has them all.
_TOLD_WARNINGS = 600


def run(job: StageRun) -> StageResult:
    spec = job.spec
    assert isinstance(spec, PrepareSpec)
    check_task(spec.task, spec.columns)

    @cache
    def hub() -> Hub:
        return Hub(endpoint=job.config.runtime.hub_endpoint, token_file=job.mounts.hub_token)

    downloads = job.partial / "downloads"
    # The data come first: they are small, and most of what is wrong is wrong with them.
    given = {
        name: find_files(sources, split=name, datasets=job.mounts.datasets, downloads=downloads, hub=hub)
        for name, sources in {"train": spec.train, "validation": spec.validation, "test": spec.test}.items()
    }
    problems = Problems()
    rows = dataset.survey(given, spec=spec, problems=problems)
    _tell_problems(problems, job)
    plan = dataset.plan(given, rows, spec=spec)
    job.progress.update(ratio=0.1)

    name, directory, revision = _locate(job, spec, hub=hub)
    config = base.read_config(directory, name=name)
    weights = base.read_weights(directory, name=name)
    template = templates.load_template(directory, name=name, spec=spec.template)
    tokenizer = templates.load_tokenizer(directory, name=name, special_tokens=template.special_tokens)
    context = base.context_length(config)
    limit = min(spec.max_sequence_length, context or spec.max_sequence_length)
    # Test rows need only fit the model: leaving out what is long to train on would make the score too good.
    limits = {Side.TRAIN: limit, Side.VALIDATION: limit, Side.TEST: context or limit}
    begin = job.progress.now.ratio or 0.0
    done = tokenize(
        given,
        plan=plan,
        spec=spec,
        encoder=Encoder(
            template=template,
            tokenizer=tokenizer,
            name="spec.template.inline: it" if template.source == "inline" else f"{name}: its chat template",
        ),
        limits=limits,
        directory=job.partial,
        report=lambda share: job.progress.update(ratio=begin + share * (0.65 - begin)),
    )
    kept = _kept(rows, plan, done)
    _check_rows(done, limits=limits, spec=spec, prompts=len(np.unique(kept[Side.TRAIN].keys)))

    model = BaseModel(
        path=str(directory),
        digest=base.digest_model(directory, name=name, progress=job.progress, share=0.3),
        revision=revision,
        architecture=base.architecture_of(config),
        model_type=str(config.get("model_type", "")),
        parameters=weights.parameters,
        dtype=weights.dtype,
        size_bytes=weights.size_bytes,
        context_length=context,
        template=template.source,
    )
    report = build_report(
        tallies=done.tallies,
        kept=kept,
        limits=limits,
        labels=_label_tokens(spec, template=template, tokenizer=tokenizer),
        template={"source": template.source, "hash": template.hash},
        sources=_sources(given, rows, done),
    )
    for warning in report["warnings"]:
        log.warning("%s", warning)
    shutil.rmtree(downloads, ignore_errors=True)
    dataset_digest = _write(job.partial, report=report, model=model, template=template)
    warned = {"warnings": brief(report["warnings"], length=_TOLD_WARNINGS)} if report["warnings"] else {}
    return StageResult(
        facts={
            **warned,
            "revision": revision,
            "baseDigest": model.digest,
            "architecture": model.architecture,
            "datasetDigest": dataset_digest,
            "templateHash": template.hash,
            "trainRows": str(done.tallies[Side.TRAIN].written),
            "validationRows": str(done.tallies[Side.VALIDATION].written),
            "testRows": str(done.tallies[Side.TEST].written),
        }
    )


def _tell_problems(problems: Problems, job: StageRun) -> None:
    """Raise `InvalidData` for problems; of more than fit into a message, many are left in a file beside the output."""
    place = Path(f"{job.config.output}.problems.json")
    if not problems.count:
        place.unlink(missing_ok=True)
        return
    if problems.count > dataset.SHOWN_PROBLEMS:
        content = {"problems": problems.count, "first": [str(problem) for problem in problems.first]}
        place.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    raise problems.failure(more=place.relative_to(job.config.artifacts).as_posix())


def _locate(job: StageRun, spec: PrepareSpec, *, hub: Callable[[], Hub]) -> tuple[str, Path, str]:
    """What the user calls the base model, where it is, and its commit."""
    source = spec.base_model
    if isinstance(source, HubModel):
        directory, commit = hub().fetch_model(
            source, directory=Path(job.config.artifacts) / "base", progress=job.progress, share=0.4
        )
        return f"{source.repo}@{commit[:12]}", directory, commit
    assert isinstance(source, LocalModel)
    name = f"claim {source.claim}: {source.path or '/'}"
    root = job.mounts.base_model
    directory = root / source.path.lstrip("/")
    if not directory.resolve().is_relative_to(root.resolve()):
        raise InvalidConfig(reason="BaseModelNotFound", message=f"{name}: leads out of the claim; correct its path")
    return name, directory, ""


def _kept(rows: Mapping[str, Rows], plan: Plan, done: Tokenized) -> dict[Side, Kept]:
    """What is left of each side, by the numbers that its rows are known by."""
    found = {}
    for side in Side:
        chosen = {name: done.kept[name] & (plan.sides[name] == side) for name in rows}
        found[side] = Kept(
            keys=np.concatenate([dataset.keys_of(rows[name])[mask] for name, mask in chosen.items()]),
            answers=np.concatenate([dataset.answers_of(rows[name])[mask] for name, mask in chosen.items()]),
            labels=np.concatenate(
                [np.frombuffer(rows[name].labels, dtype=np.int16)[mask] for name, mask in chosen.items()]
            ),
        )
    return found


def _sources(given: Given, rows: Mapping[str, Rows], done: Tokenized) -> list[dict[str, object]]:
    return [
        {"split": split, "name": file.name, "weight": file.weight, "read": read, "rows": kept}
        for split, files in given.items()
        for file, read, kept in zip(
            files,
            np.bincount(np.frombuffer(rows[split].files, dtype=np.uint16), minlength=len(files)).tolist(),
            done.sources[split],
            strict=True,
        )
    ]


def _label_tokens(spec: PrepareSpec, *, template: Template, tokenizer: Tokenizer) -> dict[str, LabelTokens]:
    """Each label as it is answered: tokens between the prompt and the end of turn."""
    if not isinstance(spec.task, ClassificationTask):
        return {}
    question = [{"role": "user", "content": "?"}]
    prompt = len(tokenizer.encode([template.render(question, prompt=True)])[0])
    found = {}
    for label in spec.task.labels:
        whole = tokenizer.encode([template.render([*question, {"role": "assistant", "content": label}], prompt=False)])[
            0
        ][prompt:]
        end = next(place for place, token in enumerate(whole) if token in tokenizer.end_ids)
        unknown = tokenizer.unknown_id is not None and tokenizer.unknown_id in whole[:end]
        found[label] = LabelTokens(tokens=end, unknown=unknown)
    return found


def _check_rows(done: Tokenized, *, limits: Mapping[Side, int], spec: PrepareSpec, prompts: int) -> None:
    for side, tally in done.tallies.items():
        if tally.too_long.rows and not tally.kept:
            raise InvalidData(
                reason="RowsTooLong",
                message=f"all {tally.too_long.rows} rows of {side.name.lower()} are longer than {limits[side]} tokens "
                f"(the first: {tally.too_long.places[0]}): raise spec.training.maxSequenceLength, or shorten the texts",
            )
    if not done.tallies[Side.TEST].kept:
        raise InvalidData(
            reason="NoTestRows",
            message="there are no rows to evaluate on: name files in spec.dataset.test, or hold rows out with "
            f"spec.dataset.split.test (it is {spec.split.test:g}, and the data have "
            f"{prompts} different prompts)",
        )
    if not done.tallies[Side.TRAIN].kept:
        raise InvalidData(
            reason="NoTrainRows",
            message=f"no rows are left to train on: spec.dataset.split holds out {spec.split.validation:g} for "
            f"validation and {spec.split.test:g} for test, and the weights of the sources keep "
            f"{', '.join(f'{source.weight:g}' for source in spec.train)} of their rows",
        )


def _write(directory: Path, *, report: Mapping[str, object], model: BaseModel, template: Template) -> str:
    """Write what stands beside the rows; returns the digest of the rows."""
    digest = hashlib.sha256()
    for name in FILES.values():
        digest.update(f"{name}:{output.digest_file(directory / name)}\n".encode())
    (directory / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
    for name, content in ((REPORT_FILE, report), (BASE_FILE, model.to_json())):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return "sha256:" + digest.hexdigest()


__all__ = ["BASE_FILE", "REPORT_FILE", "TEMPLATE_FILE", "TEST_FILE", "run"]

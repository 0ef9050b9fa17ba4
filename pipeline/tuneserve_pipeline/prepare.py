"""Fetches and checks the base model and the data, renders rows as conversations, and splits them: all without a GPU.

What is wrong with the input is found here, before anything expensive starts. Must import no torch.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

from tuneserve_pipeline import base, output, templates
from tuneserve_pipeline.base import BaseModel
from tuneserve_pipeline.contract import ClassificationTask, HubModel, LocalModel, PrepareSpec
from tuneserve_pipeline.errors import InvalidConfig, InvalidData
from tuneserve_pipeline.formats import DataFile, Problem, read_rows
from tuneserve_pipeline.hub import Hub
from tuneserve_pipeline.report import build_report
from tuneserve_pipeline.sources import find_files
from tuneserve_pipeline.splits import Splits, hold_out
from tuneserve_pipeline.stage import StageResult, StageRun
from tuneserve_pipeline.tasks import Example, check_task, convert
from tuneserve_pipeline.templates import Template, Tokenizer

log = logging.getLogger(__name__)

TRAIN_FILE = "train.jsonl"
VALIDATION_FILE = "validation.jsonl"
TEST_FILE = "test.jsonl"
REPORT_FILE = "report.json"
BASE_FILE = "base.json"
TEMPLATE_FILE = "chat_template.jinja"

#: A message names so many problems at most: enough to see the pattern, few enough for a termination message.
SHOWN_PROBLEMS = 20


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
    splits = read_splits(given, spec=spec)
    job.progress.update(ratio=0.1)

    name, directory, revision = _locate(job, spec, hub=hub)
    config = base.read_config(directory, name=name)
    weights = base.read_weights(directory, name=name)
    template = templates.load_template(directory, name=name)
    tokenizer = templates.load_tokenizer(directory, name=name, special_tokens=template.special_tokens)
    context = base.context_length(config)
    limit = min(spec.max_sequence_length, context or spec.max_sequence_length)
    # Test rows need only fit the model: leaving out what is long to train on would make the score too good.
    limits = {"train": limit, "validation": limit, "test": context or limit}
    lengths, too_long, splits = _fit(splits, limits=limits, template=template, tokenizer=tokenizer, name=name)
    _check_rows(splits, too_long=too_long, limits=limits, spec=spec)
    job.progress.update(ratio=0.6)

    model = BaseModel(
        path=str(directory),
        digest=base.digest_model(directory, name=name, progress=job.progress, share=0.35),
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
        splits,
        lengths=lengths,
        too_long=too_long,
        limits=limits,
        labels=spec.task.labels if isinstance(spec.task, ClassificationTask) else (),
        template={"source": template.source, "hash": template.hash},
        sources=[{"split": split, "name": file.name} for split, files in given.items() for file in files],
    )
    for warning in report["warnings"]:
        log.warning("%s", warning)
    shutil.rmtree(downloads, ignore_errors=True)
    dataset_digest = _write(job.partial, splits=splits, report=report, model=model, template=template)
    return StageResult(
        facts={
            "revision": revision,
            "baseDigest": model.digest,
            "architecture": model.architecture,
            "datasetDigest": dataset_digest,
            "templateHash": template.hash,
            "trainRows": str(len(splits.train)),
            "validationRows": str(len(splits.validation)),
            "testRows": str(len(splits.test)),
        }
    )


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


def read_splits(given: dict[str, list[DataFile]], *, spec: PrepareSpec) -> Splits:
    """All rows of all files; raises `InvalidData` with the first problems and their number."""
    problems: list[Problem] = []
    rows = {name: _read(files, spec=spec, problems=problems) for name, files in given.items()}
    if problems:
        raise InvalidData(reason=_reason(problems), message=describe(problems))
    held_out = hold_out(rows["train"], split=spec.split, validation=not spec.validation, test=not spec.test)
    return Splits(
        train=held_out.train,
        validation=rows["validation"] if spec.validation else held_out.validation,
        test=rows["test"] if spec.test else held_out.test,
    )


def _read(files: Iterable[DataFile], *, spec: PrepareSpec, problems: list[Problem]) -> list[Example]:
    examples: list[Example] = []
    for file in files:
        before = len(examples) + len(problems)
        for found in convert(read_rows(file), task=spec.task, columns=spec.columns):
            if isinstance(found, Problem):
                problems.append(found)
            else:
                examples.append(found)
        if len(examples) + len(problems) == before:
            problems.append(Problem(place=file.name, text="has no rows: fill it, or remove it from spec.dataset"))
    return examples


def _reason(problems: Sequence[Problem]) -> str:
    return "InvalidRows" if len(problems) > 1 else "InvalidRow"


def describe(problems: Sequence[Problem]) -> str:
    """One problem as it is; of several the first, one a line, and how many there are."""
    if len(problems) == 1:
        return str(problems[0])
    shown = problems[:SHOWN_PROBLEMS]
    head = f"{len(problems)} problems in the data"
    head += f", the first {len(shown)}:" if len(shown) < len(problems) else ":"
    return "\n".join([head, *map(str, shown)])


def _fit(
    splits: Splits, *, limits: dict[str, int], template: Template, tokenizer: Tokenizer, name: str
) -> tuple[dict[str, list[int]], dict[str, int], Splits]:
    """Measure every row and leave out what is too long; lengths are of what stays."""
    kept: dict[str, list[Example]] = {}
    lengths: dict[str, list[int]] = {}
    too_long: dict[str, int] = {}
    for split, examples in splits.items().items():
        measured = templates.measure(examples, template=template, tokenizer=tokenizer, name=name)
        fits = [index for index, length in enumerate(measured) if length <= limits[split]]
        kept[split] = [examples[index] for index in fits]
        lengths[split] = [measured[index] for index in fits]
        too_long[split] = len(measured) - len(fits)
    return lengths, too_long, Splits(**kept)


def _check_rows(splits: Splits, *, too_long: dict[str, int], limits: dict[str, int], spec: PrepareSpec) -> None:
    for name, rows in splits.items().items():
        if too_long[name] and not rows:
            raise InvalidData(
                reason="RowsTooLong",
                message=f"all {too_long[name]} rows of {name} are longer than {limits[name]} tokens: raise "
                "spec.training.maxSequenceLength, or shorten the texts",
            )
    if not splits.test:
        raise InvalidData(
            reason="NoTestRows",
            message="there are no rows to evaluate on: name files in spec.dataset.test, or hold rows out with "
            f"spec.dataset.split.test (it is {spec.split.test:g}, and the data have "
            f"{len({row.key for row in splits.train})} different prompts)",
        )
    if not splits.train:
        raise InvalidData(
            reason="NoTrainRows",
            message=f"no rows are left to train on: spec.dataset.split holds out {spec.split.validation:g} for "
            f"validation and {spec.split.test:g} for test",
        )


def _write(directory: Path, *, splits: Splits, report: dict[str, object], model: BaseModel, template: Template) -> str:
    """Write all outputs; returns the digest of the rows."""
    names = {"train": TRAIN_FILE, "validation": VALIDATION_FILE, "test": TEST_FILE}
    digest = hashlib.sha256()
    for split, examples in splits.items().items():
        path = directory / names[split]
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in examples)
        digest.update(f"{names[split]}:{output.digest_file(path)}\n".encode())
    (directory / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
    for name, content in ((REPORT_FILE, report), (BASE_FILE, model.to_json())):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return "sha256:" + digest.hexdigest()

"""`prepare` as a Job runs it: what it puts out, and what it says of each mistake in the model and the data."""

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from support.stages import Finished, Workspace
from support.tiny import CHAT_TEMPLATE, LABELS, reviews, write_jsonl
from tuneserve_pipeline.contract import (
    ClaimFile,
    ClassificationTask,
    ConfigMapFile,
    ExitCode,
    InstructionTask,
    LocalModel,
    PrepareSpec,
    Split,
)


def spec_with(base: PrepareSpec, **changes: Any) -> PrepareSpec:
    return base.model_copy(update=changes)


def prepare(workspace: Workspace, spec: PrepareSpec) -> Finished:
    return workspace.run_here(workspace.config(spec))


@pytest.fixture
def data(workspace: Workspace) -> Path:
    """The claim `reviews`, with thirty good rows in `train.jsonl`."""
    directory = workspace.datasets / "reviews"
    write_jsonl(directory / "train.jsonl", reviews(30))
    return directory


@pytest.fixture
def own_model(workspace: Workspace, tiny_model: Path) -> tuple[Workspace, Path]:
    """A copy of the tiny model on the workspace's claim, to be changed."""
    directory = workspace.root / "models" / "copy"
    shutil.copytree(tiny_model, directory)
    return Workspace(root=workspace.root, base_model=directory.parent), directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


# --- what comes out --------------------------------------------------------------------------------------------------


def decoded(finished: Finished, model: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a Parquet file as text: all of it, and what is learned."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = []
    for row in finished.rows(name):
        ids, spans = row["input_ids"], row["loss_spans"]
        pairs = zip(spans[::2], spans[1::2], strict=True)
        learned = [tokenizer.decode(ids[start:end], skip_special_tokens=False) for start, end in pairs]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        rows.append({"text": text, "learned": learned, "source": row["source"]})
    return rows


def test_rows_become_tokens_in_a_seeded_split(prepared: tuple[Workspace, Finished], tiny_model: Path) -> None:
    _, finished = prepared
    rows = {name: decoded(finished, tiny_model, f"{name}.parquet") for name in ("train", "validation")}
    test = finished.rows("test.jsonl")
    assert (len(rows["train"]), len(rows["validation"]), len(test)) == (96, 12, 12)
    trained = {row["source"]: row for found in rows.values() for row in found}
    assert len({row["text"] for row in trained.values()} | {json.dumps(row["prompt"]) for row in test}) == 120
    instruction = f"Classify the text. Answer with one of: {', '.join(LABELS)}."
    for number, review in enumerate(reviews(120), start=1):
        source = f"claim reviews: train.jsonl:{number}"
        question = f"{instruction}\n\n{review['text']}"
        if source in trained:
            begin = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            assert trained[source]["text"] == begin + review["label"] + "<|im_end|>"
            assert trained[source]["learned"] == [review["label"] + "<|im_end|>"]
        else:
            (row,) = [row for row in test if row["source"] == source]
            assert row["prompt"] == [{"role": "user", "content": question}]
            assert row["completion"] == [{"role": "assistant", "content": review["label"]}]
            assert row["label"] == review["label"]


def test_the_base_model_is_described(prepared: tuple[Workspace, Finished], tiny_model: Path) -> None:
    _, finished = prepared
    base = finished.json("base.json")
    assert base["path"] == str(tiny_model)
    assert (base["architecture"], base["modelType"]) == ("LlamaForCausalLM", "llama")
    with safe_open(tiny_model / "model.safetensors", framework="numpy") as weights:
        counted = sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    assert (base["parameters"], base["dtype"], base["contextLength"]) == (counted, "BF16", 512)
    assert (finished.directory / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    facts = finished.outcome.facts
    assert facts["baseDigest"] == base["digest"]
    assert facts["templateHash"] == "sha256:" + hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    assert (facts["trainRows"], facts["validationRows"], facts["testRows"]) == ("96", "12", "12")


def test_the_report_counts_classes_and_lengths(prepared: tuple[Workspace, Finished]) -> None:
    _, finished = prepared
    report: Any = finished.json("report.json")
    labels = {f"claim reviews: train.jsonl:{n}": row["label"] for n, row in enumerate(reviews(120), start=1)}
    for split, file in (("train", "train.parquet"), ("validation", "validation.parquet"), ("test", "test.jsonl")):
        found = Counter(labels[row["source"]] for row in finished.rows(file))
        assert report["labels"][split] == {label: found[label] for label in LABELS}
        assert sum(bucket["rows"] for bucket in report["tokens"][split]["histogram"]) == report["rows"][split]
    assert report["tokens"]["train"]["total"] == sum(len(row["input_ids"]) for row in finished.rows("train.parquet"))
    assert report["labelTokens"].keys() == set(LABELS) and report["unknownLabels"] == []
    assert report["warnings"] == []


def test_the_same_input_gives_the_same_digest_and_another_seed_another(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    first = prepare(workspace, classification)
    shutil.rmtree(first.directory)
    assert prepare(workspace, classification).outcome.digest == first.outcome.digest
    other = prepare(workspace, spec_with(classification, split=Split(seed=43)))
    assert other.outcome.facts["datasetDigest"] != first.outcome.facts["datasetDigest"]


def test_files_for_validation_and_test_are_used_as_they_are(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    rows = reviews(40)
    write_jsonl(data / "validation.jsonl", rows[30:35])
    write_jsonl(data / "test.jsonl", [*rows[35:40], rows[0]])
    spec = spec_with(
        classification,
        validation=(ClaimFile(claim="reviews", path="validation.jsonl"),),
        test=(ClaimFile(claim="reviews", path="test.jsonl"),),
    )
    finished = prepare(workspace, spec)
    assert finished.code == 0, finished.log
    facts = finished.outcome.facts
    assert (facts["trainRows"], facts["validationRows"], facts["testRows"]) == ("30", "5", "6")
    report: Any = finished.json("report.json")
    assert report["overlap"] == {"validation": 0, "test": 1}
    assert any("score says little" in warning for warning in report["warnings"])
    assert "score says little" in facts["warnings"]


def test_the_first_test_rows_are_a_sample_of_all(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    rows = sorted(reviews(90), key=lambda row: row["label"])
    write_jsonl(data / "test.jsonl", rows)
    spec = spec_with(classification, test=(ClaimFile(claim="reviews", path="test.jsonl"),))
    test = prepare(workspace, spec).rows("test.jsonl")
    assert sorted(row["source"] for row in test) == sorted(f"claim reviews: test.jsonl:{n}" for n in range(1, 91))
    assert {row["label"] for row in test[:20]} == set(LABELS)


def test_an_instruction_data_set(
    workspace: Workspace, classification: PrepareSpec, data: Path, tiny_model: Path
) -> None:
    rows = [{"instruction": f"Say {n}.", "input": "Loud" if n % 2 else "", "output": f"It is {n}"} for n in range(20)]
    write_jsonl(data / "train.jsonl", rows)
    finished = prepare(workspace, spec_with(classification, task=InstructionTask()))
    assert finished.code == 0, finished.log
    turn = "<|im_end|>\n<|im_start|>assistant\n"
    texts = [row["text"] for row in decoded(finished, tiny_model, "train.parquet")]
    for row in finished.rows("test.jsonl"):
        assert "label" not in row
        texts.append(row["prompt"][0]["content"] + turn + row["completion"][0]["content"])
    for says in ("Say 1.\n\nLoud", "Say 2."):
        assert any(f"{says}{turn}It is" in text for text in texts)


def test_a_config_map_is_read_and_named(workspace: Workspace, classification: PrepareSpec) -> None:
    path = write_jsonl(workspace.datasets / "train-0" / "rows.jsonl", reviews(30))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = ConfigMapFile(name="small", key="rows.jsonl", digest=digest)
    finished = prepare(workspace, spec_with(classification, train=(source,)))
    assert finished.code == 0, finished.log
    assert finished.rows("train.parquet")[0]["source"].startswith("ConfigMap small: rows.jsonl:")


def test_a_config_map_that_was_edited_meanwhile_is_read_again_later(
    workspace: Workspace, classification: PrepareSpec
) -> None:
    write_jsonl(workspace.datasets / "train-0" / "rows.jsonl", reviews(30))
    source = ConfigMapFile(name="small", key="rows.jsonl", digest="0" * 64)
    finished = prepare(workspace, spec_with(classification, train=(source,)))
    assert (finished.code, finished.reason) == (ExitCode.UNAVAILABLE, "DatasetChanged")


def test_long_rows_are_left_out_of_training_but_not_of_the_test(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    rows = reviews(30)
    long = {"text": "very " * 80 + "good", "label": "positive"}
    write_jsonl(data / "train.jsonl", [*rows, long])
    write_jsonl(data / "test.jsonl", [rows[0] | {"text": "so " * 80}])
    spec = spec_with(classification, test=(ClaimFile(claim="reviews", path="test.jsonl"),), max_sequence_length=80)
    finished = prepare(workspace, spec)
    assert finished.code == 0, finished.log
    report: Any = finished.json("report.json")
    left_out = sum(report["tooLong"][name]["rows"] for name in ("train", "validation"))
    assert left_out == 1
    assert report["tooLong"]["test"] == {"rows": 0, "limit": 512}
    assert max(report["tokens"]["train"]["longest"], report["tokens"]["validation"]["longest"]) <= 80
    assert any("longer than 80 tokens" in warning for warning in report["warnings"])


def test_a_model_without_a_chat_template_gets_a_plain_one(
    own_model: tuple[Workspace, Path], classification: PrepareSpec, data: Path
) -> None:
    workspace, directory = own_model
    (directory / "chat_template.jinja").unlink()
    finished = prepare(workspace, spec_with(classification, base_model=LocalModel(claim="models", path="copy")))
    assert finished.code == 0, finished.log
    assert finished.json("base.json")["template"] == "default"
    report: Any = finished.json("report.json")
    assert any("no chat template" in warning for warning in report["warnings"])
    assert "### Response:" in (finished.directory / "chat_template.jinja").read_text(encoding="utf-8")


def test_torch_is_never_loaded(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    trap = workspace.root / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    config = workspace.config(classification)
    environment = workspace.environment()
    environment["PYTHONPATH"] = f"{trap.parent}:{environment['PYTHONPATH']}"
    process = subprocess.Popen(
        workspace.command(config), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert workspace.finish(config, process).code == 0


# --- what is wrong with the data -------------------------------------------------------------------------------------

GOOD = reviews(20)


def lines(*, broken: dict[int, str]) -> str:
    """Twenty good rows as JSON lines, some of them (by number) replaced."""
    return "\n".join(broken.get(number, json.dumps(row)) for number, row in enumerate(GOOD, start=1)) + "\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lines(broken={17: '{"text": "a", "label": '}), ["claim reviews: train.jsonl:17: not valid JSON", "one JSON"]),
        (lines(broken={3: "[1, 2]"}), ["train.jsonl:3", "must be a JSON object", "list"]),
        (lines(broken={5: '{"text": "a", "label": "Positve"}'}), ["train.jsonl:5", "'Positve'", "'positive'?"]),
        (lines(broken={5: '{"text": "a", "label": "weird"}'}), ["train.jsonl:5", "negative, neutral, positive"]),
        (lines(broken={2: '{"text": "  ", "label": "neutral"}'}), ["train.jsonl:2", "'text' is empty"]),
        (lines(broken={2: '{"text": 7, "label": "neutral"}'}), ["train.jsonl:2", "'text' is a int"]),
        (lines(broken={2: '{"text": null, "label": "neutral"}'}), ["train.jsonl:2", "'text' is empty"]),
        (lines(broken={9: '{"text": "a"}'}), ["train.jsonl:9", "has no 'label'", "it has: text"]),
        (lines(broken={1: '{"sentence": "a", "label": "neutral"}'}), ["train.jsonl:1", "sentence", "columns"]),
        ("", ["claim reviews: train.jsonl: has no rows"]),
        ("\n \n", ["claim reviews: train.jsonl: has no rows"]),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(
    workspace: Workspace, classification: PrepareSpec, data: Path, content: str, says: list[str]
) -> None:
    (data / "train.jsonl").write_text(content, encoding="utf-8")
    finished = prepare(workspace, classification)
    assert finished.code == ExitCode.INVALID_DATA, finished.log
    for part in says:
        assert part in finished.message
    assert str(workspace.root) not in finished.message
    assert not finished.directory.exists() and not Path(f"{finished.directory}.partial").exists()


def test_another_encoding_is_named(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    (data / "train.jsonl").write_bytes(lines(broken={4: '{"text": "ärger", "label": "neutral"}'}).encode("latin-1"))
    finished = prepare(workspace, classification)
    assert finished.code == ExitCode.INVALID_DATA
    assert "train.jsonl:4: not UTF-8 (byte 0xe4" in finished.message
    (data / "train.jsonl").write_bytes(lines(broken={}).encode("utf-16"))
    wide = prepare(workspace, classification)
    assert "it is UTF-16" in wide.message and "save the file as UTF-8" in wide.message


def test_many_problems_are_counted_and_the_first_are_listed(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    write_jsonl(data / "train.jsonl", [{"text": f"row {n}", "label": "bad"} for n in range(500)])
    finished = prepare(workspace, classification)
    assert finished.code == ExitCode.INVALID_DATA
    first, more, *listed = finished.message.splitlines()
    assert first == "500 problems in the data, the first 20:"
    assert len(listed) == 20 and listed[-1].startswith("claim reviews: train.jsonl:20: ")
    assert len(workspace.termination.read_bytes()) <= 4096
    file = finished.directory.with_name(f"{finished.directory.name}.problems.json")
    assert more == f"(the first 500 are in prepare/{file.name} on the artifacts claim)"
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told["problems"] == len(told["first"]) == 500
    assert told["first"][499].startswith("claim reviews: train.jsonl:500: 'label' is 'bad'")
    write_jsonl(data / "train.jsonl", GOOD)
    assert prepare(workspace, classification).code == 0
    assert not file.exists()


def test_values_stand_for_labels(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    numbers = {label: str(number) for number, label in enumerate(LABELS)}
    rows = [row if n % 2 else {**row, "label": int(numbers[row["label"]])} for n, row in enumerate(reviews(30))]
    write_jsonl(data / "train.jsonl", rows)
    task = ClassificationTask(labels=LABELS, label_values={label: (number,) for label, number in numbers.items()})
    finished = prepare(workspace, spec_with(classification, task=task))
    assert finished.code == 0, finished.message
    report: Any = finished.json("report.json")
    assert sum(report["labels"]["train"].values()) == 24
    write_jsonl(data / "train.jsonl", [*rows, {"text": "a", "label": "7"}])
    wrong = prepare(workspace, spec_with(classification, task=task, revision="2"))
    assert "'label' is '7', which is none of the labels (negative, neutral, positive, 0, 1, 2)" in wrong.message


@pytest.mark.parametrize(
    ("values", "says"),
    [({"good": ("1",)}, "'good' is none of the labels"), ({"neutral": ("1",), "positive": ("1",)}, "name it once")],
)
def test_values_that_stand_for_no_label_or_for_two(
    workspace: Workspace, classification: PrepareSpec, values: dict[str, tuple[str, ...]], says: str
) -> None:
    task = ClassificationTask(labels=LABELS, label_values=values)
    finished = prepare(workspace, spec_with(classification, task=task))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "InvalidLabel") and says in finished.message


def test_a_label_column_that_no_row_has_is_said_once(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    write_jsonl(data / "train.jsonl", [{"text": row["text"], "sentiment": row["label"]} for row in GOOD])
    finished = prepare(workspace, classification)
    assert "claim reviews: train.jsonl:1: has no 'label', it has: text, sentiment" in finished.message
    assert "train.jsonl:2" not in finished.message
    renamed = prepare(workspace, spec_with(classification, columns={"label": "sentiment"}))
    assert renamed.code == 0, renamed.log


@pytest.mark.parametrize("path", ["nowhere.jsonl", "sub/nowhere.jsonl"])
def test_a_missing_file_is_named_with_what_is_there(
    workspace: Workspace, classification: PrepareSpec, data: Path, path: str
) -> None:
    finished = prepare(workspace, spec_with(classification, train=(ClaimFile(claim="reviews", path=path),)))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_DATA, "DatasetNotFound")
    assert f"claim reviews: {path}: there is no such file" in finished.message
    assert "train.jsonl" in finished.message and "spec.dataset.train[0]" in finished.message


def test_a_path_never_leaves_its_claim(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    write_jsonl(workspace.datasets / "other" / "train.jsonl", reviews(30))
    source = ClaimFile(claim="reviews", path="../other/train.jsonl")
    finished = prepare(workspace, spec_with(classification, train=(source,)))
    assert finished.code == ExitCode.INVALID_DATA and "leads out of the claim" in finished.message


def test_a_directory_is_no_file(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    finished = prepare(workspace, spec_with(classification, train=(ClaimFile(claim="reviews", path="."),)))
    assert finished.code == ExitCode.INVALID_DATA and "is a directory (train.jsonl)" in finished.message


def test_all_rows_too_long(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    finished = prepare(workspace, spec_with(classification, max_sequence_length=16))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_DATA, "RowsTooLong")
    assert "longer than 16 tokens" in finished.message and "maxSequenceLength" in finished.message


def test_too_few_rows_to_hold_any_out(workspace: Workspace, classification: PrepareSpec, data: Path) -> None:
    write_jsonl(data / "train.jsonl", reviews(2))
    finished = prepare(workspace, classification)
    assert (finished.code, finished.reason) == (ExitCode.INVALID_DATA, "NoTestRows")
    assert "spec.dataset.test" in finished.message and "2 different prompts" in finished.message


# --- what is wrong with the spec -------------------------------------------------------------------------------------


def test_a_column_for_a_field_that_the_task_lacks(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    finished = prepare(workspace, spec_with(classification, columns={"sentence": "text"}))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "UnknownColumn")
    assert "sentence" in finished.message and "text, label" in finished.message


@pytest.mark.parametrize("labels", [("good", "Good"), ("yes", "yes."), ("?", "a")])
def test_labels_that_no_answer_could_tell_apart(
    workspace: Workspace, classification: PrepareSpec, labels: tuple[str, ...]
) -> None:
    finished = prepare(workspace, spec_with(classification, task=ClassificationTask(labels=labels)))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "InvalidLabel")


# --- what is wrong with the model ------------------------------------------------------------------------------------


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate_weights(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_shard(directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")


def need_code(directory: Path) -> None:
    edit_json(directory / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})


def break_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ raise_exception('only Klingon') }}", encoding="utf-8")


def forget_end(directory: Path) -> None:
    template = CHAT_TEMPLATE.replace("<|im_end|>", "")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def shift_prompt(directory: Path) -> None:
    template = CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant: go on\n' }}{% endif %}")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def drop_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def break_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        (remove_weights, "NotSafetensors", "pytorch_model.bin"),
        (truncate_weights, "BaseModelIncomplete", "model.safetensors is cut off"),
        (lose_shard, "BaseModelIncomplete", "model-00002-of-00002.safetensors is missing"),
        (need_code, "CodeRequired", "auto_map"),
        (lambda directory: (directory / "config.json").unlink(), "BaseModelIncomplete", "has no config.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "BaseModelIncomplete", "not valid JSON"),
        (
            lambda directory: edit_json(directory / "config.json", quantization_config={"quant_method": "gptq"}),
            "BaseModelQuantized",
            "gptq",
        ),
        (
            lambda directory: edit_json(directory / "config.json", architectures=["BertForMaskedLM"]),
            "ArchitectureUnsupported",
            "BertForMaskedLM",
        ),
        (drop_tokenizer, "TokenizerMissing", "tokenizer.json"),
        (break_tokenizer, "TokenizerBroken", "cannot be loaded"),
        (break_template, "TemplateFailed", "only Klingon"),
        (forget_end, "TemplateWithoutEnd", "<|im_end|>"),
        (shift_prompt, "TemplateNotPrefix", "train.jsonl:"),
    ],
)
def test_a_base_model_that_cannot_work_is_refused(
    own_model: tuple[Workspace, Path], classification: PrepareSpec, data: Path, change: Any, reason: str, says: str
) -> None:
    workspace, directory = own_model
    change(directory)
    finished = prepare(workspace, spec_with(classification, base_model=LocalModel(claim="models", path="copy")))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, reason), finished.log
    assert "copy" in finished.message and says in finished.message


def test_code_that_a_known_model_also_has_is_left_alone(
    own_model: tuple[Workspace, Path], classification: PrepareSpec, data: Path
) -> None:
    workspace, directory = own_model
    edit_json(directory / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.Llama"})
    finished = prepare(workspace, spec_with(classification, base_model=LocalModel(claim="models", path="copy")))
    assert finished.code == 0, finished.log


@pytest.mark.parametrize(("path", "says"), [("absent", "there is: copy"), ("../elsewhere", "leads out of the claim")])
def test_a_base_model_that_is_not_there(
    own_model: tuple[Workspace, Path], classification: PrepareSpec, data: Path, path: str, says: str
) -> None:
    workspace, _ = own_model
    finished = prepare(workspace, spec_with(classification, base_model=LocalModel(claim="models", path=path)))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "BaseModelNotFound")
    assert "claim models" in finished.message and says in finished.message

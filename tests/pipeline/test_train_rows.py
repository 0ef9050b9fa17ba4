"""What the loss covers: the answer and the token that ends it, exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from support.stages import Finished, Workspace
from support.tiny import CHAT_TEMPLATE
from tuneserve_pipeline.errors import InvalidData
from tuneserve_pipeline.rows import IGNORED, read_rows
from tuneserve_pipeline.tokenization import Base, load_tokenizer, read_base


@pytest.fixture
def base(prepared: tuple[Workspace, Finished]) -> Base:
    return read_base(prepared[1].directory)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_supervised_text_is_answer_and_end_of_turn(prepared: tuple[Workspace, Finished], base: Base) -> None:
    _, finished = prepared
    told = finished.rows("train.jsonl")
    rows = read_rows(finished.directory / "train.jsonl", template=base.template, tokenizer=base.tokenizer)
    tokenizer = load_tokenizer(base)
    assert len(rows) == len(told) == 96
    for row, entry in zip(rows, told, strict=True):
        supervised = [token for token in row.labels if token != IGNORED]
        assert tokenizer.decode(supervised) == entry["label"] + "<|im_end|>"
        assert len(row.labels) == len(row.input_ids)
        prompt = tokenizer.apply_chat_template(entry["prompt"], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(row.input_ids) == prompt + entry["label"] + "<|im_end|>"


def test_only_the_first_rows_are_read_when_asked(prepared: tuple[Workspace, Finished], base: Base) -> None:
    path = prepared[1].directory / "train.jsonl"
    whole = read_rows(path, template=base.template, tokenizer=base.tokenizer)
    assert read_rows(path, template=base.template, tokenizer=base.tokenizer, limit=5) == whole[:5]


def test_prompt_that_is_no_prefix_is_refused(tmp_path: Path, base: Base) -> None:
    # The generation prompt opens a thought that the whole conversation does not have.
    thinking = CHAT_TEMPLATE.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    path = write(
        tmp_path / "train.jsonl",
        {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")], "source": "reviews.jsonl:7"},
    )
    with pytest.raises(InvalidData, match=r"^reviews\.jsonl:7: .*tokens of its prompt"):
        read_rows(path, template=replace(base.template, text=thinking), tokenizer=base.tokenizer)


def test_answer_that_never_ends_is_refused(tmp_path: Path, base: Base) -> None:
    endless = CHAT_TEMPLATE.replace("+ '<|im_end|>'", "")
    path = write(tmp_path / "train.jsonl", {"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]})
    with pytest.raises(InvalidData, match=r"^train\.jsonl:1: .*never stop"):
        read_rows(path, template=replace(base.template, text=endless), tokenizer=base.tokenizer)


def test_row_that_is_too_long_is_refused_not_cut(prepared: tuple[Workspace, Finished], base: Base) -> None:
    with pytest.raises(InvalidData, match=r"more than the 20 to train on"):
        read_rows(prepared[1].directory / "train.jsonl", template=base.template, tokenizer=base.tokenizer, longest=20)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": []}', '{"prompt": [], "completion": []}'])
def test_damaged_rows_are_named(tmp_path: Path, base: Base, line: str) -> None:
    path = tmp_path / "train.jsonl"
    good = json.dumps({"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]})
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(InvalidData, match=r"train\.jsonl:2 .*rebuild: prepare"):
        read_rows(path, template=base.template, tokenizer=base.tokenizer)

"""Reading, converting, splitting and describing rows: the pure parts of `prepare`."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneserve_pipeline.contract import ClassificationTask, FileFormat, InstructionTask, Split
from tuneserve_pipeline.formats import DataFile, Problem, Row, detect_format, read_rows
from tuneserve_pipeline.layout import select_files
from tuneserve_pipeline.report import summarise
from tuneserve_pipeline.splits import (
    Keys,
    Side,
    answer_key,
    contradicting,
    copies,
    hold_out,
    overlap,
    prompt_key,
    repeated,
)
from tuneserve_pipeline.tasks import Example, convert

ROWS: list[dict[str, Any]] = [{"text": "one, two", "label": "a"}, {"text": 'say "so"\nagain', "label": "b"}]


def write(path: Path, content: bytes | str) -> DataFile:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataFile(path=path, name=f"claim c: {path.name}")


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def values(file: DataFile) -> list[dict[str, Any]]:
    found = list(read_rows(file))
    assert all(isinstance(row, Row) for row in found), found
    return [dict(row.values) for row in found if isinstance(row, Row)]


CSV = 'text,label\n"one, two",a\n"say ""so""\nagain",b\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(ROWS)),
        ("rows.ndjson", jsonl(ROWS)),
        ("rows.jsonl.gz", gzip.compress(jsonl(ROWS).encode(), mtime=0)),
        ("rows.jsonl", "\ufeff" + jsonl(ROWS)),
        ("rows.jsonl", jsonl(ROWS).replace("\n", "\r\n")),
        ("rows.jsonl", "\n" + jsonl(ROWS).rstrip()),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.json", jsonl(ROWS)),
        ("rows.csv", CSV),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("rows.csv", CSV.replace(",", ";").replace("one; two", "one, two")),
        ("rows.tsv", CSV.replace(",", "\t").replace("one\t two", "one, two")),
        ("rows.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace('"\r\nagain', '"\nagain')),
        ("rows", jsonl(ROWS)),
        ("rows", json.dumps(ROWS)),
        ("rows", CSV),
    ],
)
def test_each_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes | str) -> None:
    assert values(write(tmp_path / name, content)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    file = DataFile(path=tmp_path / "rows.parquet", name="claim c: rows.parquet")
    assert values(file) == ROWS
    (tmp_path / "rows.parquet").rename(tmp_path / "rows")
    assert values(DataFile(path=tmp_path / "rows", name="claim c: rows")) == ROWS


def test_what_is_told_counts_more_than_the_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(jsonl(ROWS), encoding="utf-8")
    assert detect_format(DataFile(path=path, name="rows.csv", format=FileFormat.JSONL)) is FileFormat.JSONL


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[{"text": "x"},\n {"text": }]', "a.json:2: not valid JSON (Expecting value at column 11)"),
        ("a.json", '{\n "text": "x"\n}', "a.json: is no JSON list"),
        ("a.json", "[1]", "a.json: row 1: a row must be a JSON object"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS * 50).encode(), mtime=0)[:-20], "gzip file is broken or cut off"),
        ("a.parquet", b"PAR1 and no more", "not a readable Parquet file"),
        ("a.csv", "text,label\na,b,c\n", "a.csv:2: has 3 fields, the header has 2"),
        ("a.csv", 'text,label\nx,a\n"open,b\n', "not valid CSV"),
        ("a.csv", "text,text\nx,a\n", "a.csv:1: the header names text twice"),
        ("a.csv", "text,label\nä,b\n".encode("latin-1"), "not UTF-8 (byte 0xe4"),
        ("a.jsonl", "[" * 100_000, "not valid JSON (too deep)"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem(tmp_path: Path, name: str, content: bytes | str, says: str) -> None:
    found = list(read_rows(write(tmp_path / name, content)))
    assert says in str(next(item for item in found if isinstance(item, Problem)))


@given(st.binary(max_size=300), st.sampled_from(["a.jsonl", "a.json", "a.csv", "a", "a.parquet", "a.jsonl.gz"]))
def test_no_content_ends_in_an_exception(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any-{name}"
    for found in read_rows(write(path, content)):
        assert isinstance(found, Row | Problem)


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", CSV + "three,c\n")
    assert [row.place.rsplit(":", 1)[1] for row in read_rows(file)] == ["2", "3", "5"]
    file = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [row.place.rsplit(":", 1)[1] for row in read_rows(file)] == ["1", "3"]


# --- tasks -----------------------------------------------------------------------------------------------------------


def rows(*found: dict[str, Any]) -> list[Row]:
    return [Row(values=value, place=f"f:{number}") for number, value in enumerate(found, start=1)]


def test_labels_may_be_numbers() -> None:
    (example,) = convert(rows({"text": "x", "label": 1}), task=ClassificationTask(labels=("0", "1")), columns={})
    assert isinstance(example, Example) and example.label == "1"


def test_an_own_instruction_stands_before_the_text() -> None:
    task = ClassificationTask(labels=("a", "b"), instruction="Which?")
    (example,) = convert(rows({"text": " x ", "label": " a "}), task=task, columns={})
    assert isinstance(example, Example)
    assert example.prompt[0]["content"] == "Which?\n\nx"
    assert example.completion[0]["content"] == "a"


def test_a_row_that_lacks_a_column_later_does_not_end_the_file() -> None:
    task = InstructionTask()
    found = list(
        convert(
            rows({"instruction": "a", "output": "b"}, {}, {"instruction": "c", "output": "d"}), task=task, columns={}
        )
    )
    assert [type(item) for item in found] == [Example, Problem, Example]
    assert len(list(convert(rows({}, {}, {}), task=task, columns={}))) == 1


# --- splits ----------------------------------------------------------------------------------------------------------


def keys(prompts: Iterable[str], *, seed: int = 42) -> Keys:
    return np.array([prompt_key(prompt, seed=seed) for prompt in prompts], dtype=np.uint64)


def answers(texts: Iterable[str]) -> Keys:
    return np.array([answer_key(text) for text in texts], dtype=np.uint64)


@given(st.lists(st.text(max_size=3), max_size=60), st.integers(0, 5))
def test_no_prompt_is_on_two_sides(prompts: list[str], seed: int) -> None:
    sides = hold_out(keys(prompts, seed=seed), split=Split(seed=seed), validation=True, test=True).tolist()
    assert len(sides) == len(prompts)
    assert len(set(zip(prompts, sides, strict=True))) == len(set(prompts))
    if len(set(keys(prompts).tolist())) >= 3:
        assert set(sides) == set(Side)


def test_shares_are_exact_and_an_added_row_moves_few_others() -> None:
    prompts = [f"prompt {n}" for n in range(1000)]
    before = hold_out(keys(prompts), split=Split(), validation=True, test=True)
    assert np.bincount(before).tolist() == [800, 100, 100]
    after = hold_out(keys([*prompts, "another"]), split=Split(), validation=True, test=True)
    assert ((before == Side.TEST) & (after[:-1] != Side.TEST)).sum() <= 1


def test_nothing_is_held_out_for_what_has_files() -> None:
    sides = hold_out(keys(f"{n}" for n in range(10)), split=Split(), validation=False, test=True)
    assert np.bincount(sides, minlength=3).tolist() == [9, 0, 1]


def test_prompts_that_differ_in_case_and_spaces_are_one() -> None:
    same = keys(["Say it", "say  it\n", "SAY IT"])
    assert len(set(same.tolist())) == 1 and same[0] != keys(["Sayit"])[0]


def test_repetitions_are_counted() -> None:
    prompts, said = keys(["a", "a", "a", "b"]), answers(["x", "x", "y", "x"])
    assert (repeated(prompts, said), contradicting(prompts, said), overlap(prompts, keys(["a", "c"]))) == (1, 1, 1)


def test_a_weight_repeats_rows_or_leaves_some_out() -> None:
    prompts, said = keys(f"{n}" for n in range(10_000)), answers(["x"] * 10_000)
    assert set(copies(prompts, said, np.full(10_000, 3.0)).tolist()) == {3}
    found = copies(prompts, said, np.full(10_000, 1.25))
    assert set(found.tolist()) == {1, 2} and abs(found.mean() - 1.25) < 0.02
    assert (copies(prompts, said, np.full(10_000, 0.25)) <= found).all()


@given(st.lists(st.integers(1, 100_000), min_size=1))
def test_a_histogram_counts_each_row_once(lengths: list[int]) -> None:
    found = summarise(lengths)
    assert sum(bucket["rows"] for bucket in found["histogram"]) == len(lengths)
    assert found["total"] == sum(lengths)


# --- files of a data set's repository --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "card", "subset", "split", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "data/test.parquet"], {}, "default", "test", ["data/test.parquet"]),
        (["train.jsonl", "README.md", "dev.jsonl"], {}, "default", "validation", ["dev.jsonl"]),
        (["all.csv"], {}, "default", "train", ["all.csv"]),
        (["all.csv"], {}, "default", "test", []),
        (["train.csv", "eval.csv"], {}, "default", "validation", []),
        (["sst2/train.jsonl", "cola/train.jsonl"], {}, "cola", "train", ["cola/train.jsonl"]),
        (
            ["training/a.csv", "training/b.csv", "test/a.csv"],
            {},
            "default",
            "train",
            ["training/a.csv", "training/b.csv"],
        ),
        (
            ["x/1.csv", "x/2.csv", "y.csv"],
            {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": ["x/*.csv"]}]}]},
            "default",
            "train",
            ["x/1.csv", "x/2.csv"],
        ),
        (
            ["a.csv", "b.csv"],
            {"configs": [{"config_name": "main", "data_files": "b.csv"}]},
            "default",
            "train",
            ["b.csv"],
        ),
        (
            ["en/train.csv", "de/train.csv"],
            {
                "configs": [
                    {"config_name": "en", "data_dir": "en"},
                    {"config_name": "de", "data_dir": "de", "default": True},
                ]
            },
            "default",
            "train",
            ["de/train.csv"],
        ),
    ],
)
def test_files_of_a_split(names: list[str], card: dict[str, Any], subset: str, split: str, expected: list[str]) -> None:
    assert select_files(names, card=card, subset=subset, split=split) == expected

"""Rows as `prepare` leaves them, read for training: the loss covers answers and the tokens that end them, exactly."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from support.stages import Finished, Workspace
from tuneserve_pipeline.errors import InvalidData
from tuneserve_pipeline.rows import IGNORED, Preference, read_preferences, read_rows
from tuneserve_pipeline.tables import ANSWER_COLUMNS, GROUP_ROWS, PREFERENCE_COLUMNS, TableWriter
from tuneserve_pipeline.tokenization import load_tokenizer, read_base


@pytest.fixture
def train(prepared: tuple[Workspace, Finished]) -> Path:
    return prepared[1].directory / "train.parquet"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    with TableWriter(tmp_path / "train.parquet", columns=PREFERENCE_COLUMNS) as table:
        table.add([[1, 2], [3, 9], [4, 5, 9]], source="a:1")
        table.add([[1], [6, 7, 8, 9], [9]], source="a:2")
    return tmp_path / "train.parquet"


def test_supervised_text_is_answer_and_end_of_turn(prepared: tuple[Workspace, Finished], train: Path) -> None:
    _, finished = prepared
    tokenizer = load_tokenizer(read_base(finished.directory))
    rows = read_rows(train)
    assert len(rows) == 96
    for row, length in zip(rows, rows.lengths, strict=True):
        assert len(row.input_ids) == len(row.labels) == length
        first = next(place for place, label in enumerate(row.labels) if label != IGNORED)
        assert row.labels[first:] == row.input_ids[first:]
        assert tokenizer.decode(row.labels[first:]) in {
            f"{label}<|im_end|>" for label in finished.json("report.json")["labelTokens"]
        }
        assert tokenizer.decode(row.input_ids[:first]).endswith("<|im_start|>assistant\n")


def test_few_rows_are_spread_over_the_file(train: Path) -> None:
    whole = list(read_rows(train))
    assert list(read_rows(train, limit=5)) == [whole[place] for place in (0, 19, 38, 57, 76)]
    assert list(read_rows(train, limit=1000)) == whole


def test_all_rows_at_once_are_the_rows_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    with TableWriter(path, columns=ANSWER_COLUMNS) as table:
        for number in range(GROUP_ROWS + 1):  # two groups
            table.add([[number, 1, 2, 3, 4], [1, 2, 3, 5]], source="a:1")
        table.add([[5, 6], [0, 2]], source="b:1")
    rows = read_rows(path)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 2
    assert rows[0].labels == [IGNORED, 1, IGNORED, 3, 4]
    assert rows[-1].labels == [5, 6]
    found = rows.to_arrow().to_pylist()
    assert found == [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    assert [(ids.tolist(), labels.tolist()) for ids, labels in rows.arrays()] == [
        (row.input_ids, row.labels) for row in rows
    ]
    assert len(found) == GROUP_ROWS + 2


@pytest.mark.parametrize("columns", [ANSWER_COLUMNS, PREFERENCE_COLUMNS])
def test_a_file_without_rows(tmp_path: Path, columns: tuple[str, ...]) -> None:
    with TableWriter(tmp_path / "validation.parquet", columns=columns):
        pass
    rows = read_rows(tmp_path / "validation.parquet", limit=64, longest=10)
    assert not rows and rows.to_arrow().num_rows == 0


def test_pairs_of_answers(pairs: Path) -> None:
    rows = read_preferences(pairs)
    assert list(rows) == [
        Preference(prompt=[1, 2], chosen=[3, 9], rejected=[4, 5, 9]),
        Preference(prompt=[1], chosen=[6, 7, 8, 9], rejected=[9]),
    ]
    assert rows.lengths.tolist() == [5, 5]


def test_the_chosen_answers_of_pairs_are_rows_too(pairs: Path) -> None:
    rows = read_rows(pairs)
    assert [row.input_ids for row in rows] == [[1, 2, 3, 9], [1, 6, 7, 8, 9]]
    assert [row.labels for row in rows] == [[IGNORED, IGNORED, 3, 9], [IGNORED, 6, 7, 8, 9]]


def test_rows_without_rejected_answers_are_no_pairs(train: Path) -> None:
    with pytest.raises(InvalidData, match=r"no rejected answers; set spec\.task\.preference"):
        read_preferences(train)


def test_row_that_is_too_long_is_refused_not_cut(train: Path, pairs: Path) -> None:
    with pytest.raises(InvalidData, match=r"row 1 has \d+ tokens, more than the 20 to train on"):
        read_rows(train, longest=20)
    with pytest.raises(InvalidData, match=r"row 1 has 5 tokens, more than the 4 to train on"):
        read_preferences(pairs, longest=4)


def test_a_file_that_is_not_whole_is_named(tmp_path: Path, train: Path) -> None:
    with pytest.raises(InvalidData, match=r"train\.parquet .*rebuild: prepare"):
        read_rows(tmp_path / "train.parquet")
    (tmp_path / "train.parquet").write_bytes(train.read_bytes()[:-100])
    with pytest.raises(InvalidData, match=r"train\.parquet .*rebuild: prepare"):
        read_rows(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(InvalidData, match=r"its columns are text.*rebuild: prepare"):
        read_rows(tmp_path / "train.parquet")

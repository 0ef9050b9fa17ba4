"""A checkpoint counts only when it is whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneserve_pipeline.checkpoints import SEAL, CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(directory=tmp_path / "checkpoints", keep=2)


def write(store: CheckpointStore, step: int) -> Path:
    path = store.aside / f"checkpoint-{step}"
    (path / "nested").mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(bytes(100) + str(step).encode())
    (path / "nested" / "state.json").write_text(json.dumps({"step": step}))
    return path


def seal(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.seal(write(store, step), step=step)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_nothing_there_is_no_checkpoint(store: CheckpointStore) -> None:
    assert store.newest() is None


def test_newest_is_by_number_and_old_ones_go(store: CheckpointStore) -> None:
    seal(store, 8, 9, 10)
    newest = store.newest()
    assert newest is not None
    assert (newest.step, newest.path.name) == (10, "step-10")
    assert (newest.path / "optimizer.pt").read_bytes().endswith(b"10")
    assert names(store) == ["step-10", "step-9"]


def test_one_stays_even_if_none_is_to_be_kept(tmp_path: Path) -> None:
    store = CheckpointStore(directory=tmp_path / "checkpoints", keep=0)
    seal(store, 1, 2)
    assert names(store) == ["step-2", "writing"]


def test_what_was_being_written_does_not_count(store: CheckpointStore) -> None:
    seal(store, 4)
    unfinished = write(store, 8)
    (unfinished / SEAL).write_text("{}")
    newest = store.newest()
    assert newest is not None and newest.step == 4
    assert names(store) == ["step-4"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: (path / SEAL).unlink(),
        lambda path: (path / SEAL).write_text("{"),
        lambda path: (path / SEAL).write_text("[]"),
        lambda path: (path / "optimizer.pt").unlink(),
        lambda path: (path / "optimizer.pt").write_bytes(b"short"),
        lambda path: (path / "optimizer.pt").write_bytes(b"\1" + (path / "optimizer.pt").read_bytes()[1:]),
        lambda path: (path / "nested" / "state.json").write_text('{"step": 9}'),
    ],
    ids=["no seal", "cut seal", "strange seal", "missing file", "cut file", "flipped bit", "other content"],
)
def test_damaged_one_is_removed_and_the_one_before_counts(
    store: CheckpointStore, harm: Callable[[Path], object]
) -> None:
    seal(store, 4, 8)
    harm(store.directory / "step-8")
    newest = store.newest()
    assert newest is not None and newest.step == 4
    assert names(store) == ["step-4"]


def test_same_step_again_replaces_the_old(store: CheckpointStore) -> None:
    seal(store, 4)
    (store.directory / "step-4" / "optimizer.pt").write_bytes(b"old")
    seal(store, 4)
    newest = store.newest()
    assert newest is not None and (newest.path / "optimizer.pt").read_bytes().endswith(b"4")


def test_other_names_are_left_alone(store: CheckpointStore) -> None:
    seal(store, 4)
    (store.directory / "step-x").mkdir()
    newest = store.newest()
    assert newest is not None and newest.step == 4
    assert (store.directory / "step-x").is_dir()


def test_all_go_at_the_end(store: CheckpointStore) -> None:
    seal(store, 4)
    store.remove()
    assert not store.directory.exists()

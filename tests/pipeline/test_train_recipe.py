"""Steps, micro-batches, the order of rows, and what a pod may use: pure."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneserve_pipeline import machine
from tuneserve_pipeline.contract import TrainSpec
from tuneserve_pipeline.recipe import Shape, keeps_activations, make_recipe, micro_batch, row_order, total_steps


@pytest.mark.parametrize(
    ("given_spec", "rows", "steps"),
    [
        ({"max_steps": 7}, 1000, 7),
        ({}, 100, 21),  # three epochs of seven steps, the last of each smaller
        ({"epochs": 0.5}, 160, 5),
        ({"epochs": 0.001}, 160, 1),
        ({"epochs": 1.0, "global_batch_size": 64}, 10, 1),
    ],
)
def test_total_steps(given_spec: dict[str, float], rows: int, steps: int) -> None:
    assert (
        total_steps(TrainSpec(**given_spec), epoch_steps=math.ceil(rows / TrainSpec(**given_spec).global_batch_size))
        == steps
    )


@given(global_batch_size=st.integers(1, 512), wanted=st.integers(1, 1024))
def test_global_batch_is_kept(global_batch_size: int, wanted: int) -> None:
    micro = micro_batch(global_batch_size=global_batch_size, wanted=wanted)
    assert 1 <= micro <= wanted
    assert global_batch_size % micro == 0


def test_micro_batch_is_bounded_by_tokens_unless_it_is_given() -> None:
    spec = TrainSpec(global_batch_size=16, max_steps=100, warmup_ratio=0.1)
    long = make_recipe(spec, lengths=[30, 1000], device="cpu")
    assert (long.micro_batch_size, long.accumulation, long.warmup_steps) == (4, 4, 10)
    assert make_recipe(spec, lengths=[30, 90_000], device="cpu").micro_batch_size == 1
    told = make_recipe(spec, lengths=[30, 1000], device="cpu", micro_batch_size=6)
    assert (told.micro_batch_size, told.accumulation) == (4, 4)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=400),
    batch=st.integers(1, 32),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_in_an_epoch(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    order = row_order(lengths, batch=batch, seed=seed, epoch=epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == row_order(lengths, batch=batch, seed=seed, epoch=epoch)


def test_rows_of_a_step_have_like_lengths() -> None:
    lengths = [10 + 37 * row % 200 for row in range(1600)]
    order = row_order(lengths, batch=16, seed=1, epoch=0)
    assert order != row_order(lengths, batch=16, seed=1, epoch=1)
    assert order != row_order(lengths, batch=16, seed=2, epoch=0)
    padded = sum(16 * max(lengths[row] for row in order[start : start + 16]) for start in range(0, 1600, 16))
    unsorted = sum(16 * max(lengths[start : start + 16]) for start in range(0, 1600, 16))
    assert padded < 1.1 * sum(lengths) < 1.5 * sum(lengths) < unsorted


def test_activations_of_a_7b_model_are_kept_only_where_they_fit() -> None:
    llama = Shape(layers=32, hidden=4096, intermediate=11008)
    assert not keeps_activations(shape=llama, tokens=4096, free_bytes=18 * 2**30)
    assert keeps_activations(shape=llama, tokens=4096, free_bytes=40 * 2**30)


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("max 100000", 64), ("50000 100000", 1)])
def test_cores_are_those_of_the_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert machine.cpu_count(cgroups=tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [(400000, 4), (-1, 64)])
def test_cores_of_the_older_hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: int, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_count(cgroups=tmp_path) == cores


def test_memory_is_what_the_pod_has_left(tmp_path: Path) -> None:
    information = tmp_path / "meminfo"
    information.write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    groups = tmp_path / "groups"
    groups.mkdir()
    assert machine.memory_available(cgroups=groups, memory_info=information) == 1000 * 1024
    (groups / "memory.max").write_text("600000\n")
    (groups / "memory.current").write_text("500000\n")
    (groups / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert machine.memory_available(cgroups=groups, memory_info=information) == 300_000
    (groups / "memory.max").write_text("max\n")
    assert machine.memory_available(cgroups=groups, memory_info=information) == 1000 * 1024

"""Steps, micro-batches, the order of rows, and what a pod may use: pure."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneserve_pipeline import machine
from tuneserve_pipeline.contract import TrainSpec
from tuneserve_pipeline.recipe import (
    Recipe,
    Shape,
    keeps_activations,
    make_recipe,
    micro_batches,
    step_rows,
    steps_in_epoch,
)


@pytest.mark.parametrize(
    ("given_spec", "rows", "steps"),
    [
        ({"max_steps": 7}, 1000, 7),
        ({}, 100, 21),  # three epochs of seven steps, the last of each smaller
        ({"epochs": 0.5}, 160, 5),
        ({"epochs": 0.001}, 160, 1),
        ({"epochs": 1.0, "global_batch_size": 64}, 10, 1),
        ({"epochs": 2.0, "global_batch_tokens": 100}, 50, 10),  # of ten tokens each
        ({"epochs": 2.0, "global_batch_tokens": 5}, 50, 100),  # a step has at least one row
    ],
)
def test_total_steps(given_spec: dict[str, float], rows: int, steps: int) -> None:
    assert make_recipe(TrainSpec(**given_spec), lengths=[10] * rows, device="cpu").steps == steps


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=400)


@given(lengths=LENGTHS, tokens=st.integers(300, 2000), rows=st.none() | st.integers(1, 40))
def test_micro_batches_have_all_rows_once_and_fit(lengths: list[int], tokens: int, rows: int | None) -> None:
    recipe = Recipe(steps=1, warmup_steps=0, decay_steps=0, tokens_at_a_time=tokens, rows_at_a_time=rows)
    parts = micro_batches(lengths, recipe=recipe)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        if rows is None:
            assert len(part) * max(lengths[row] for row in part) <= tokens
        else:
            assert len(part) <= rows


def test_what_is_on_the_device_is_bounded_by_tokens_unless_rows_are_given() -> None:
    spec = TrainSpec(global_batch_size=16, max_steps=100, warmup_ratio=0.1)
    long = make_recipe(spec, lengths=[30, 1000], device="cpu")
    assert (long.tokens_at_a_time, long.rows_at_a_time, long.warmup_steps) == (4096, None, 10)
    assert micro_batches([30] * 12 + [1000] * 4, recipe=long) == [list(range(12)), [12, 13, 14, 15]]
    assert make_recipe(spec, lengths=[30, 90_000], device="cpu").tokens_at_a_time == 90_000
    told = make_recipe(spec, lengths=[30, 1000], device="cpu", micro_batch_size=6)
    assert [len(part) for part in micro_batches([30] * 16, recipe=told)] == [6, 6, 4]


@given(
    lengths=LENGTHS,
    batch=st.integers(1, 32),
    tokens=st.none() | st.integers(1, 4000),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_in_an_epoch(
    lengths: list[int], batch: int, tokens: int | None, seed: int, epoch: int
) -> None:
    spec = TrainSpec(global_batch_size=batch, global_batch_tokens=tokens, seed=seed)
    steps = step_rows(spec, lengths=lengths, epoch=epoch)
    assert sorted(row for step in steps for row in step) == list(range(len(lengths)))
    assert len(steps) == steps_in_epoch(spec, lengths=lengths)
    assert all(steps)
    assert steps == step_rows(spec, lengths=lengths, epoch=epoch)


@given(lengths=st.lists(st.integers(1, 50), min_size=200, max_size=400), tokens=st.integers(500, 2000))
def test_steps_have_about_as_many_tokens_as_are_asked_for(lengths: list[int], tokens: int) -> None:
    steps = step_rows(TrainSpec(global_batch_tokens=tokens), lengths=lengths, epoch=0)
    mean = sum(lengths) / len(steps)
    assert mean <= tokens
    assert all(abs(sum(lengths[row] for row in step) - mean) <= 2 * 50 for step in steps)


@pytest.mark.parametrize("given_spec", [{"global_batch_size": 16}, {"global_batch_tokens": 1700}])
def test_rows_of_a_step_have_like_lengths(given_spec: dict[str, int]) -> None:
    lengths = [10 + 37 * row % 200 for row in range(1600)]
    steps = step_rows(TrainSpec(seed=1, **given_spec), lengths=lengths, epoch=0)
    assert steps != step_rows(TrainSpec(seed=1, **given_spec), lengths=lengths, epoch=1)
    assert steps != step_rows(TrainSpec(seed=2, **given_spec), lengths=lengths, epoch=0)
    padded = sum(len(step) * max(lengths[row] for row in step) for step in steps)
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


def test_what_triton_would_not_find_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert machine.lacks_for_triton(headers=tmp_path) == "C compiler (gcc or clang)"
    for name in ("clang", "zcc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert machine.lacks_for_triton(headers=tmp_path) == f"{tmp_path}/Python.h"
    (tmp_path / "Python.h").write_text("")
    assert machine.lacks_for_triton(headers=tmp_path) is None
    monkeypatch.setenv("CC", "none")
    assert machine.lacks_for_triton(headers=tmp_path) == "C compiler (gcc or clang)"
    monkeypatch.setenv("CC", "zcc")
    assert machine.lacks_for_triton(headers=tmp_path) is None

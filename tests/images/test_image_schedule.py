"""The order of steps that run beside each other."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuneserve_images.schedule import run_all


@st.composite
def forests(draw: st.DrawFn) -> dict[str, str | None]:
    """Steps whose parent is an earlier one, or none."""
    parents: dict[str, str | None] = {}
    for number in range(draw(st.integers(1, 8))):
        parents[str(number)] = draw(st.sampled_from([None, *parents]))
    return parents


@given(parents=forests(), data=st.data())
def test_every_step_runs_once_and_after_its_parent(parents: dict[str, str | None], data: st.DataObject) -> None:
    names = data.draw(st.permutations(list(parents)))
    done: list[str] = []
    lock = threading.Lock()

    def run(name: str) -> None:
        with lock:
            assert parents[name] is None or parents[name] in done
            done.append(name)

    run_all(names, parents=parents, run=run, stop=lambda: None)
    assert sorted(done) == sorted(names)


def test_two_branches_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)
    run_all(["a", "b"], parents={"a": None, "b": None}, run=lambda name: both.wait() and None, stop=lambda: None)


def test_an_error_stops_the_rest_and_is_told() -> None:
    ran: list[str] = []
    stopped = threading.Event()

    def run(name: str) -> None:
        ran.append(name)
        if name == "bad":
            raise OSError("no space left")
        assert stopped.wait(30), "the other step goes on until it is stopped"

    parents = {"bad": None, "long": None, "child": "bad", "later": None}
    with pytest.raises(OSError, match="no space left"):
        run_all(["long", "bad", "child", "later"], parents=parents, run=run, stop=stopped.set)
    assert sorted(ran) == ["bad", "long"]


def test_a_parent_that_nobody_builds_is_an_error() -> None:
    with pytest.raises(ValueError, match="never built"):
        run_all(["a", "b"], parents={"a": "b", "b": "a"}, run=lambda name: None, stop=lambda: None)

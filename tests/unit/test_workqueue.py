"""The schedule alone, with any interleaving of events; and the queue on a real event loop."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tuneserve.workqueue import Key, Result, Schedule, WorkQueue

A, B, C = (Key("FineTune", "team", name) for name in "abc")


def _schedule(*, jitter: float = 1.0) -> Schedule:
    return Schedule(first_backoff=1.0, longest_backoff=60.0, jitter=lambda: jitter)


def _taken(schedule: Schedule, now: float) -> Key | None:
    found = schedule.take(now=now)
    return found[0] if found else None


def test_a_key_added_twice_is_worked_on_once() -> None:
    schedule = _schedule()
    schedule.add(A, now=0)
    schedule.add(A, now=1)
    assert schedule.take(now=2) == (A, 0)
    assert schedule.take(now=2) is None


def test_a_key_is_never_worked_on_twice_at_once_but_once_more() -> None:
    schedule = _schedule()
    schedule.add(A, now=0)
    assert _taken(schedule, 0) == A
    schedule.add(A, now=1)
    schedule.add(A, now=2)
    assert schedule.take(now=3) is None
    schedule.succeeded(A, now=4)
    assert _taken(schedule, 4) == A
    schedule.succeeded(A, now=5)
    assert schedule.take(now=5) is None


def test_first_in_first_out() -> None:
    schedule = _schedule()
    for key in (B, A, C, A):
        schedule.add(key, now=0)
    assert [_taken(schedule, 0) for _ in range(3)] == [B, A, C]


def test_a_wish_for_later_keeps_the_earliest_date() -> None:
    schedule = _schedule()
    schedule.add_after(A, 10, now=0)
    schedule.add_after(A, 5, now=0)
    schedule.add_after(A, 20, now=0)
    assert schedule.next_deadline() == 5
    assert schedule.take(now=4.9) is None
    assert schedule.take(now=5) == (A, 5)
    schedule.succeeded(A, now=6)
    assert schedule.take(now=100) is None, "the later wishes were answered by the earlier run"


def test_an_event_does_not_wait_for_the_date() -> None:
    schedule = _schedule()
    schedule.add_after(A, 10, now=0)
    schedule.add(A, now=1)
    assert _taken(schedule, 1) == A
    schedule.succeeded(A, now=2, requeue_after=30)
    assert schedule.next_deadline() == 32


def test_failures_come_back_slower_and_slower_and_success_forgets_them() -> None:
    schedule = _schedule()
    delays, now = [], 0.0
    schedule.add(A, now=now)
    for _ in range(8):
        assert _taken(schedule, now) == A
        delays.append(schedule.failed(A, now=now))
        now += delays[-1]
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60]
    assert _taken(schedule, now) == A
    schedule.succeeded(A, now=now)
    schedule.add(A, now=now)
    assert _taken(schedule, now) == A
    assert schedule.failed(A, now=now) == 1


@given(st.floats(min_value=0, max_value=1, exclude_max=True))
def test_jitter_takes_at_most_half_of_the_delay(jitter: float) -> None:
    schedule = _schedule(jitter=jitter)
    schedule.add(A, now=0)
    schedule.take(now=0)
    assert 0.5 <= schedule.failed(A, now=0) <= 1


def test_a_thousand_failures_do_not_overflow() -> None:
    schedule = _schedule()
    schedule.add(A, now=0)
    now = 0.0
    for _ in range(1100):
        assert _taken(schedule, now) == A
        now += schedule.failed(A, now=now)


def test_an_event_during_a_run_that_fails_is_not_lost() -> None:
    schedule = _schedule()
    schedule.add(A, now=0)
    schedule.take(now=0)
    schedule.add(A, now=1)
    schedule.failed(A, now=2)
    assert _taken(schedule, 2) == A


class Interleaving(RuleBasedStateMachine):
    """Any order of events, runs and failures: nothing is lost, nothing runs twice at once."""

    keys = st.sampled_from([A, B, C])

    def __init__(self) -> None:
        super().__init__()
        self.schedule = _schedule()
        self.now = 0.0
        self.running: set[Key] = set()
        self.owed: set[Key] = set()
        """Keys with an event that no run has begun after."""

    @rule(key=keys)
    def event(self, key: Key) -> None:
        self.schedule.add(key, now=self.now)
        self.owed.add(key)

    @rule(key=keys, seconds=st.floats(min_value=0, max_value=100))
    def later(self, key: Key, seconds: float) -> None:
        self.schedule.add_after(key, seconds, now=self.now)

    @rule(seconds=st.floats(min_value=0, max_value=100))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def start(self) -> None:
        key = _taken(self.schedule, self.now)
        if key is None:
            assert self.owed <= self.running, "an event waits although a worker is free"
        else:
            assert key not in self.running
            self.running.add(key)
            self.owed.discard(key)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), well=st.booleans(), requeue=st.none() | st.floats(min_value=0, max_value=50))
    def end(self, data: st.DataObject, well: bool, requeue: float | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(key)
        if well:
            self.schedule.succeeded(key, now=self.now, requeue_after=requeue)
        else:
            self.schedule.failed(key, now=self.now)
            assert self.schedule.next_deadline() is not None or self.schedule.depth, "a failure is forgotten"

    @invariant()
    def is_consistent(self) -> None:
        assert self.schedule.running == self.running
        deadline = self.schedule.next_deadline()
        assert (deadline is None) == (self.schedule.delayed == 0)


test_any_interleaving = Interleaving.TestCase


# --- on an event loop -------------------------------------------------------------------------------------------------


class Reconciler:
    """Counts runs; a key runs until it is let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.runs: list[Key] = []
        self.active = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.result: Callable[[Key], Result] = lambda key: Result()
        if not held:
            self.gate.set()

    async def __call__(self, key: Key) -> Result:
        self.runs.append(key)
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await self.gate.wait()
            return self.result(key)
        finally:
            self.active -= 1


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (the subject has no event to wait for)
            await asyncio.sleep(0.005)


async def test_workers_are_many_but_bounded() -> None:
    reconciler = Reconciler(held=True)
    queue = WorkQueue(reconciler, workers=2)
    running = asyncio.create_task(queue.run())
    for key in (A, B, C):
        queue.add(key)
    await _until(lambda: reconciler.active == 2)
    reconciler.gate.set()
    await _until(lambda: reconciler.runs == [A, B, C])
    assert reconciler.most == 2
    await queue.stop(grace=1)
    await running


async def test_a_failure_is_tried_again_and_does_not_hold_up_others() -> None:
    reconciler = Reconciler()

    def fail_once(key: Key) -> Result:
        if key == A and reconciler.runs.count(A) == 1:
            raise RuntimeError("first time")
        return Result()

    reconciler.result = fail_once
    queue = WorkQueue(reconciler, schedule=Schedule(first_backoff=0.01))
    running = asyncio.create_task(queue.run())
    queue.add(A)
    queue.add(B)
    await _until(lambda: reconciler.runs.count(A) == 2 and B in reconciler.runs)
    await queue.stop(grace=1)
    await running


async def test_a_reconcile_that_hangs_is_cut_off_and_tried_again() -> None:
    reconciler = Reconciler(held=True)
    queue = WorkQueue(reconciler, timeout=0.02, schedule=Schedule(first_backoff=0.01))
    running = asyncio.create_task(queue.run())
    queue.add(A)
    await _until(lambda: len(reconciler.runs) >= 2)
    reconciler.gate.set()
    await queue.stop(grace=1)
    await running


async def test_requeue_after_runs_again_without_an_event() -> None:
    reconciler = Reconciler()
    reconciler.result = lambda key: Result(requeue_after=0.01)
    queue = WorkQueue(reconciler)
    running = asyncio.create_task(queue.run())
    queue.add(A)
    await _until(lambda: len(reconciler.runs) >= 3)
    await queue.stop(grace=1)
    await running


async def test_a_stop_lets_what_runs_finish_and_starts_nothing() -> None:
    reconciler = Reconciler(held=True)
    queue = WorkQueue(reconciler, workers=1)
    running = asyncio.create_task(queue.run())
    queue.add(A)
    queue.add(B)
    await _until(lambda: reconciler.active == 1)
    stopping = asyncio.create_task(queue.stop(grace=10))
    await asyncio.sleep(0)
    reconciler.gate.set()
    await stopping
    await running
    assert reconciler.runs == [A]
    assert reconciler.active == 0


async def test_a_stop_cancels_what_does_not_finish() -> None:
    reconciler = Reconciler(held=True)
    queue = WorkQueue(reconciler)
    running = asyncio.create_task(queue.run())
    queue.add(A)
    await _until(lambda: reconciler.active == 1)
    await queue.stop(grace=0.01)
    await running
    assert reconciler.active == 0


@pytest.mark.parametrize("workers", [1, 3])
async def test_a_queue_that_stands_still_is_noticed(workers: int) -> None:
    time = 0.0
    reconciler = Reconciler(held=True)
    queue = WorkQueue(reconciler, workers=workers, clock=lambda: time)
    running = asyncio.create_task(queue.run())
    for number in range(workers):
        queue.add(Key("FineTune", "team", f"n{number}"))
    await _until(lambda: reconciler.active == workers)
    time = 500.0
    assert queue.stalled_for() == 0, "nothing is waiting"
    queue.add(A)
    time = 900.0
    assert queue.stalled_for() == 400
    reconciler.gate.set()
    await _until(lambda: queue.stalled_for() == 0)
    await queue.stop(grace=1)
    await running

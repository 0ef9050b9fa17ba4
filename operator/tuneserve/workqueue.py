"""Decides when which object is reconciled; knows nothing of Kubernetes.

One key stands for one object. A key is never worked on twice at once; added while it is worked on, it runs once
more; failures come back with exponential backoff; a wish for a later run keeps the earliest date.
`Schedule` is that logic without any input or output; `WorkQueue` runs it on the event loop.
"""

import asyncio
import heapq
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tuneserve import metrics

logger = logging.getLogger(__name__)

#: Delay of the first retry, and the longest delay (seconds).
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 120.0
#: A reconcile that takes longer (seconds) is cancelled and counts as failed: none may hold a worker for ever.
RECONCILE_TIMEOUT = 300.0


class Key(NamedTuple):
    kind: Literal["FineTune", "ModelServe"]
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True)
class Result:
    requeue_after: float | None = None
    """Seconds until the next run without an event; none: wait for an event (or the resync)."""


class Schedule:
    """Which key is due; all times are seconds of one monotonic clock, given by the caller."""

    def __init__(
        self,
        *,
        first_backoff: float = FIRST_BACKOFF,
        longest_backoff: float = LONGEST_BACKOFF,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._first_backoff = first_backoff
        self._longest_backoff = longest_backoff
        self._jitter = jitter
        self._ready: OrderedDict[Key, float] = OrderedDict()
        """Key -> since when it is due; first in, first out, so that no object starves another."""
        self._deadlines: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        """Entries that no longer match `_deadlines` are stale and skipped."""
        self._running: set[Key] = set()
        self._again: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}

    def add(self, key: Key, *, now: float) -> None:
        """Make a key due at once; during its run: once more afterwards."""
        if key in self._running:
            self._again.setdefault(key, now)
        else:
            self._deadlines.pop(key, None)
            self._ready.setdefault(key, now)

    def add_after(self, key: Key, seconds: float, *, now: float) -> None:
        """Make a key due later, unless it is due before that anyway."""
        if seconds <= 0:
            self.add(key, now=now)
            return
        due = now + seconds
        if key in self._ready or self._deadlines.get(key, due + 1) <= due:
            return
        self._deadlines[key] = due
        heapq.heappush(self._heap, (due, key))

    def take(self, *, now: float) -> tuple[Key, float] | None:
        """The next key to work on and since when it has been due; none when nothing is."""
        self._ripen(now)
        if not self._ready:
            return None
        key, since = self._ready.popitem(last=False)
        self._running.add(key)
        return key, since

    def succeeded(self, key: Key, *, now: float, requeue_after: float | None = None) -> None:
        """The run of a key ended well."""
        self._failures.pop(key, None)
        self._finish(key, now=now)
        if requeue_after is not None:
            self.add_after(key, requeue_after, now=now)

    def failed(self, key: Key, *, now: float) -> float:
        """The run of a key failed; gives the delay of its retry in seconds."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        # Between half and all of the step: many objects that fail together do not come back together.
        step = min(self._longest_backoff, self._first_backoff * 2.0 ** min(count - 1, 40))
        delay = step * (0.5 + 0.5 * self._jitter())
        self._finish(key, now=now)
        self.add_after(key, delay, now=now)
        return delay

    def _finish(self, key: Key, *, now: float) -> None:
        self._running.remove(key)
        since = self._again.pop(key, None)
        if since is not None:
            self.add(key, now=now)

    def _ripen(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            if self._deadlines.get(key) != due:
                continue
            del self._deadlines[key]
            if key in self._running:
                self._again.setdefault(key, due)
            else:
                self._ready.setdefault(key, due)

    def next_deadline(self) -> float | None:
        """When the next key becomes due by the clock alone."""
        while self._heap and self._deadlines.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def oldest(self) -> float | None:
        """Since when the longest waiting key has been due."""
        return min(self._ready.values(), default=None)

    def failures(self, key: Key) -> int:
        return self._failures.get(key, 0)

    @property
    def depth(self) -> int:
        return len(self._ready)

    @property
    def delayed(self) -> int:
        return len(self._deadlines)

    @property
    def running(self) -> frozenset[Key]:
        return frozenset(self._running)


class WorkQueue:
    """Runs `reconcile(key)` for what the schedule gives, `workers` at a time."""

    def __init__(
        self,
        reconcile: Callable[[Key], Awaitable[Result]],
        *,
        workers: int = 8,
        clock: Callable[[], float] | None = None,
        schedule: Schedule | None = None,
        timeout: float = RECONCILE_TIMEOUT,
    ) -> None:
        self._reconcile = reconcile
        self._workers = workers
        self._clock = clock or asyncio.get_running_loop().time
        self._schedule = schedule or Schedule()
        self._timeout = timeout
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._progress = self._clock()
        # Read at scrape time: a queue that stands still must not show the figures of better days.
        metrics.QUEUE_DEPTH.set_function(lambda: self._schedule.depth)
        metrics.QUEUE_DELAYED.set_function(lambda: self._schedule.delayed)
        metrics.QUEUE_RUNNING.set_function(lambda: len(self._schedule.running))
        metrics.QUEUE_OLDEST.set_function(self._oldest_seconds)

    def add(self, key: Key) -> None:
        metrics.QUEUE_ADDS.labels(kind=key.kind).inc()
        self._schedule.add(key, now=self._clock())
        self._wake.set()

    def add_after(self, key: Key, seconds: float) -> None:
        metrics.QUEUE_ADDS.labels(kind=key.kind).inc()
        self._schedule.add_after(key, seconds, now=self._clock())
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop` is called."""
        while not self._stopping:
            self._wake.clear()
            self._start_due()
            deadline = self._schedule.next_deadline()
            delay = None if deadline is None else max(0.0, deadline - self._clock())
            try:
                async with asyncio.timeout(delay):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def stop(self, *, grace: float) -> None:
        """Take no more keys; let what runs finish for `grace` seconds, then cancel it."""
        self._stopping = True
        self._wake.set()
        if self._tasks:
            _, unfinished = await asyncio.wait(self._tasks, timeout=grace)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    def stalled_for(self) -> float:
        """Seconds that keys have been due without any reconcile beginning or ending; 0 when nothing is due."""
        oldest = self._schedule.oldest()
        if oldest is None:
            return 0.0
        return max(0.0, self._clock() - max(oldest, self._progress))

    def _start_due(self) -> None:
        while len(self._tasks) < self._workers:
            now = self._clock()
            taken = self._schedule.take(now=now)
            if taken is None:
                return
            key, since = taken
            metrics.QUEUE_WAIT.labels(kind=key.kind).observe(max(0.0, now - since))
            self._progress = now
            task = asyncio.create_task(self._work(key), name=str(key))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._progress = self._clock()
        self._wake.set()

    async def _work(self, key: Key) -> None:
        started = self._clock()
        try:
            async with asyncio.timeout(self._timeout):
                result = await self._reconcile(key)
        except asyncio.CancelledError:
            self._schedule.failed(key, now=self._clock())
            raise
        except Exception as error:
            now = self._clock()
            delay = self._schedule.failed(key, now=now)
            metrics.RETRIES.labels(kind=key.kind).inc()
            metrics.RECONCILES.labels(kind=key.kind, result="error").inc()
            metrics.RECONCILE_SECONDS.labels(kind=key.kind).observe(now - started)
            # A refusal of the API server explains itself; anything else is a defect and needs its traceback.
            expected = getattr(error, "expected", False)
            logger.warning(
                "%s: reconcile failed (%d in a row), again in %.1f s: %s",
                key,
                self._schedule.failures(key),
                delay,
                str(error) or type(error).__name__,
                exc_info=not expected,
                extra={"object": str(key)},
            )
        else:
            now = self._clock()
            self._schedule.succeeded(key, now=now, requeue_after=result.requeue_after)
            metrics.RECONCILES.labels(kind=key.kind, result="success").inc()
            metrics.RECONCILE_SECONDS.labels(kind=key.kind).observe(now - started)

    def _oldest_seconds(self) -> float:
        oldest = self._schedule.oldest()
        return 0.0 if oldest is None else max(0.0, self._clock() - oldest)

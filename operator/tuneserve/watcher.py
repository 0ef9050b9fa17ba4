"""Runs kopf in a thread and an event loop of its own.

At its end kopf cancels every task of its loop that is younger than itself, and it takes over the signal handlers of
the main thread: reconciles that shall finish and a clean stop must not share either with it.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection

import kopf

logger = logging.getLogger(__name__)


class Watcher:
    """One run of kopf; the handlers of `registry` are called in its thread."""

    def __init__(
        self,
        *,
        registry: kopf.OperatorRegistry,
        settings: kopf.OperatorSettings,
        namespaces: Collection[str],
        on_ready: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._namespaces = namespaces
        self._on_ready = on_ready
        self._home = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._home.create_future()
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_flag: asyncio.Event | None = None
        # A daemon: a watcher that does not end must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    async def run(self) -> None:
        """Watch until `stop` is called; raises what ended kopf before that."""
        self._thread.start()
        await asyncio.shield(self._ended)

    async def stop(self, *, grace: float) -> None:
        """End within `grace` seconds, or leave the thread to the end of the process."""
        self._stop.set()
        if self._loop is not None and self._stop_flag is not None and not self._ended.done():
            self._loop.call_soon_threadsafe(self._stop_flag.set)
        await asyncio.wait([self._ended], timeout=grace)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._operate())
        except BaseException as caught:  # a thread's exceptions go nowhere by themselves
            error = caught
        with contextlib.suppress(RuntimeError):  # the process may have gone on to its end without us
            self._home.call_soon_threadsafe(self._end, error)

    def _end(self, error: BaseException | None) -> None:
        if error is not None:
            self._ended.set_exception(RuntimeError(f"watching ended: {error}"))
        else:
            self._ended.set_result(None)

    async def _operate(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop_flag = asyncio.Event()
        if self._stop.is_set():
            return
        ready = asyncio.Event()
        waiting = asyncio.create_task(self._tell_ready(ready))
        try:
            await kopf.operator(
                registry=self._registry,
                settings=self._settings,
                clusterwide=not self._namespaces,
                namespaces=self._namespaces,
                stop_flag=self._stop_flag,
                ready_flag=ready,
            )
        finally:
            waiting.cancel()

    async def _tell_ready(self, ready: asyncio.Event) -> None:
        await ready.wait()
        self._home.call_soon_threadsafe(self._on_ready)

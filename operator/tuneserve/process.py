"""The life of the operator's process: wait for the lease, act, and end cleanly.

It ends with 0 when asked to (SIGTERM), and with 1 when it lost the lease or a part of it failed: whoever started it
starts it anew, which is simpler and safer than to repair a half-broken process.
"""

import asyncio
import contextlib
import functools
import logging
import os
import random
import signal
import socket
import uuid
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import kopf

from tuneserve import dispatch, handlers
from tuneserve.config import OperatorConfig
from tuneserve.context import Context
from tuneserve.events import Events
from tuneserve.health import Health, serve
from tuneserve.kinds import FINETUNE, MODELSERVE
from tuneserve.kube import Kube, KubeError
from tuneserve.leader import Leader
from tuneserve.watcher import Watcher
from tuneserve.workqueue import Key, WorkQueue

logger = logging.getLogger(__name__)

#: Reconciles that run may finish for so long after SIGTERM (seconds); then they are broken off, which does no harm.
FINISH_SECONDS = 10.0
_WATCHER_SECONDS = 5.0
_CRD_SECONDS = 2.0
_SCRAPE_SECONDS = 5.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


async def run(config: OperatorConfig, *, host: str | None, port: int) -> int:
    """The exit code, when all is over."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    health = Health()
    identity = os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(serve(health, host=host, port=port))
        logger.info("health and metrics on port %d", port)
        kube = await Kube.login()
        stack.push_async_callback(kube.close)
        leader: Leader | None = None
        if config.leader_election.enabled:
            leader = Leader(kube, settings=config.leader_election, namespace=_own_namespace(), identity=identity)
            health.ready = True  # standing by: or an update of the operator would wait for it for ever
            if not await _unless(stop, leader.acquire()):
                return 0
            health.ready = False
        timeout = aiohttp.ClientTimeout(total=_SCRAPE_SECONDS)
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        context = Context(
            kube=kube,
            config=config,
            events=Events(kube, instance=identity),
            now=lambda: datetime.now(UTC),
            http=http,
        )
        return await _act(context, health=health, leader=leader, stop=stop)


async def _act(context: Context, *, health: Health, leader: Leader | None, stop: asyncio.Event) -> int:
    """Watch and reconcile until told to stop, or until a part fails."""
    loop = asyncio.get_running_loop()
    queue: WorkQueue = WorkQueue(
        lambda key: dispatch.reconcile(key, context=context, add=queue.add), workers=context.config.workers
    )
    health.stalled_for = queue.stalled_for
    registry = kopf.OperatorRegistry()
    handlers.register(registry, lambda key: _from_thread(loop, functools.partial(queue.add, key)))
    watcher = Watcher(
        registry=registry,
        settings=handlers.settings(),
        namespaces=context.config.watch_namespaces,
        on_ready=lambda: setattr(health, "ready", True),
    )
    parts: dict[str, Coroutine[Any, Any, None]] = {
        "stop": _wait(stop),
        "watcher": _watch(watcher, context.kube, context.config),
        "work queue": queue.run(),
        "resync": _resync(queue, context.kube, context.config),
    }
    if leader is not None:
        parts["lease"] = leader.hold()
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in done if task.get_name() != "stop"]
        for task in failed:
            logger.error("%s ended: %s", task.get_name(), task.exception() or "without a reason")
        if not failed:
            logger.info("stopping")
        health.ready = False
        # A lost lease leaves no time: another operator may act already.
        grace = 0.0 if any(task.get_name() == "lease" for task in failed) else FINISH_SECONDS
        await queue.stop(grace=grace)
        await watcher.stop(grace=_WATCHER_SECONDS)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if leader is not None:
            await leader.release()
    logger.info("stopped")
    return 1 if failed else 0


def _from_thread(loop: asyncio.AbstractEventLoop, call: functools.partial[None]) -> None:
    with contextlib.suppress(
        RuntimeError
    ):  # the loop has ended before the watcher: nothing is lost, all is listed again
        loop.call_soon_threadsafe(call)


async def _watch(watcher: Watcher, kube: Kube, config: OperatorConfig) -> None:
    # kopf would find no such kinds, and watch nothing for ever without a word.
    namespaces: list[str | None] = [*config.watch_namespaces[:1]] or [None]
    for kind in (FINETUNE, MODELSERVE):
        while True:
            try:
                await kube.list(kind, namespaces[0])
                break
            except KubeError as error:
                logger.warning("cannot list %s yet: %s", kind.plural, error)
                await asyncio.sleep(_CRD_SECONDS)
    await watcher.run()


async def _resync(queue: WorkQueue, kube: Kube, config: OperatorConfig) -> None:
    """Look at everything again from time to time, in case a watch has lost something without a word."""
    while True:
        await asyncio.sleep(config.resync_seconds)
        for namespace in config.watch_namespaces or (None,):
            try:
                for kind in (FINETUNE, MODELSERVE):
                    for body in await kube.list(kind, namespace):
                        metadata = body["metadata"]
                        key = Key(body["kind"], metadata["namespace"], metadata["name"])
                        # Spread out: thousands of objects must not be due in one moment.
                        queue.add_after(key, random.uniform(0, config.resync_seconds / 10))
            except KubeError as error:
                logger.warning("resync: %s", error)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether the work was done before the stop."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    for other in (task, stopped):
        other.cancel()
    results = await asyncio.gather(task, stopped, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0] is None


def _own_namespace() -> str:
    if namespace := os.environ.get("POD_NAMESPACE"):
        return namespace
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else "default"

"""Liveness, readiness and metrics of the operator over HTTP; it decides nothing and never asks the API server."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tuneserve import metrics

logger = logging.getLogger(__name__)

#: Objects that wait for so long without any reconcile beginning or ending: the queue stands still (seconds).
STANDSTILL_SECONDS = 360.0
#: A loop that runs its timers so late does not do its work (seconds).
LAG_SECONDS = 10.0
_LAG_INTERVAL = 1.0


class Health:
    """The state of the process, as its parts report it."""

    def __init__(self) -> None:
        self.ready = False
        """Whether the process does what it is there for; standing by is that too."""
        self.stalled_for: Callable[[], float] = lambda: 0.0
        """Seconds that the work queue has stood still."""
        self.lag = 0.0
        """Seconds that the event loop was late last."""

    def sickness(self) -> str | None:
        """Why the process should be started anew; none when it is well."""
        stalled = self.stalled_for()
        if stalled > STANDSTILL_SECONDS:
            return f"the work queue has stood still for {stalled:.0f} s"
        if self.lag > LAG_SECONDS:
            return f"the event loop is {self.lag:.0f} s late"
        return None

    async def measure_lag(self) -> None:
        """Watch how late the event loop is, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self.lag = max(0.0, loop.time() - due)
            metrics.LOOP_LAG.set(self.lag)


@contextlib.asynccontextmanager
async def serve(health: Health, *, host: str | None, port: int) -> AsyncIterator[int]:
    """Serve /healthz, /readyz and /metrics; gives the port (for port 0 the one that was free)."""
    app = web.Application()

    async def healthz(_request: web.Request) -> web.Response:
        sickness = health.sickness()
        return web.Response(status=503 if sickness else 200, text=(sickness or "ok") + "\n")

    async def readyz(_request: web.Request) -> web.Response:
        return web.Response(status=200 if health.ready else 503, text="ok\n" if health.ready else "not ready\n")

    async def prometheus(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", prometheus)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    lag = asyncio.create_task(health.measure_lag(), name="event loop lag")
    try:
        await web.TCPSite(runner, host=host, port=port).start()
        yield int(runner.addresses[0][1])
    finally:
        lag.cancel()
        await runner.cleanup()

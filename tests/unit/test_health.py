"""The endpoints of the operator, over real HTTP."""

import aiohttp
import pytest

from tuneserve.health import LAG_SECONDS, STANDSTILL_SECONDS, Health, serve


async def _get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


async def test_ready_only_when_said_so() -> None:
    health = Health()
    async with serve(health, host="127.0.0.1", port=0) as port:
        assert (await _get(port, "/readyz"))[0] == 503
        health.ready = True
        assert await _get(port, "/readyz") == (200, "ok\n")


async def test_a_queue_that_stands_still_is_unhealthy_and_says_why() -> None:
    health, stalled = Health(), 0.0
    health.stalled_for = lambda: stalled
    async with serve(health, host="127.0.0.1", port=0) as port:
        assert await _get(port, "/healthz") == (200, "ok\n")
        stalled = STANDSTILL_SECONDS + 1
        assert await _get(port, "/healthz") == (503, "the work queue has stood still for 361 s\n")


@pytest.mark.parametrize(("lag", "well"), [(LAG_SECONDS - 1, True), (LAG_SECONDS + 1, False)])
def test_a_loop_that_is_late_is_unhealthy(lag: float, well: bool) -> None:
    health = Health()
    health.lag = lag
    assert (health.sickness() is None) == well


async def test_metrics_are_those_of_prometheus() -> None:
    async with serve(Health(), host="127.0.0.1", port=0) as port:
        status, text = await _get(port, "/metrics")
    assert status == 200
    assert "# TYPE tuneserve_reconcile_seconds histogram" in text

"""Progress asked from a real metrics endpoint, and from those that do not answer as they should."""

import asyncio
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from aiohttp import web

from tuneserve.finetune.ledger import StageRun
from tuneserve.finetune.progress import TIMEOUT, parse, scrape
from tuneserve_pipeline.metrics import Progress as StageProgress
from tuneserve_pipeline.metrics import ProgressCollector, serve

RUN = StageRun("train", "0123456789abcdef")
INFO = 'tuneserve_stage_info{stage="train",kind="train",hash="0123456789abcdef"} 1.0\n'


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_a_stage_that_runs_is_understood(http: aiohttp.ClientSession) -> None:
    told = StageProgress()
    told.update(step=30, total=120, loss=1.23456, tokens_per_second=512.34)
    server = serve(collector=ProgressCollector(progress=told, stage="train", kind="train", hash=RUN.hash), port=0)
    assert server is not None
    found = await scrape(RUN, ip="127.0.0.1", http=http, port=server.server_port)
    assert found is not None
    assert (found.stage, found.percent, found.step, found.total_steps) == ("train", 25, 30, 120)
    assert (found.loss, found.tokens_per_second) == ("1.2346", "512.3")
    other = await scrape(StageRun("merge", RUN.hash), ip="127.0.0.1", http=http, port=server.server_port)
    assert other is None, "an address that another stage has by now"
    server.shutdown()
    server.server_close()
    assert await scrape(RUN, ip="127.0.0.1", http=http, port=server.server_port) is None


async def never(request: web.Request) -> web.Response:
    await asyncio.sleep(TIMEOUT + 1)
    return web.Response()


async def elsewhere(request: web.Request) -> web.Response:
    raise web.HTTPFound("http://169.254.169.254/")


async def endless(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    for _ in range(100):
        await answer.write(b"# " + b"x" * 65_536 + b"\n")
    return answer


async def binary(request: web.Request) -> web.Response:
    return web.Response(body=b"\xff\xfe\x00")


async def nonsense(request: web.Request) -> web.Response:
    return web.Response(text="<html>no metrics</html>")


@pytest.mark.parametrize("answer", [never, elsewhere, endless, binary, nonsense])
async def test_a_pod_that_answers_badly_costs_nothing(
    answer: Callable[..., object], http: aiohttp.ClientSession
) -> None:
    app = web.Application()
    app.router.add_get("/metrics", answer)  # type: ignore[arg-type]
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    assert await scrape(RUN, ip="127.0.0.1", http=http, port=port) is None
    await runner.cleanup()


def test_what_is_not_told_is_absent() -> None:
    found = parse(INFO, run=RUN)
    assert found is not None and found.to_body() == {"stage": "train"}


@pytest.mark.parametrize(
    ("line", "body"),
    [
        ("tuneserve_stage_progress_ratio 0.999", {"percent": 99}),
        ("tuneserve_stage_progress_ratio 7", {"percent": 100}),
        ("tuneserve_stage_loss NaN", {}),
        ("tuneserve_stage_eta_seconds +Inf", {}),
        ("tuneserve_stage_eta_seconds 12.6", {"etaSeconds": 13}),
        ("tuneserve_stage_step -1", {"step": 0}),
        ("tuneserve_stage_steps 1e30", {"totalSteps": 2**31 - 1}),
    ],
)
def test_values_always_fit_the_status(line: str, body: dict[str, object]) -> None:
    found = parse(f"{INFO}{line}\n", run=RUN)
    assert found is not None and found.to_body() == {"stage": "train", **body}

"""How far a running stage is, as its pod tells on its metrics port. A pod that does not answer costs nothing."""

import logging
import math
from collections.abc import Mapping

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tuneserve.api import Progress
from tuneserve.finetune.ledger import StageRun
from tuneserve_pipeline.contract import METRICS_PORT, StageMetric

logger = logging.getLogger(__name__)

#: Seconds that a pod has to answer.
TIMEOUT = 2.0
_LARGEST_ANSWER = 1 << 20
_INFO = "tuneserve_stage_info"
_LARGEST_COUNT = 2**31 - 1


async def scrape(run: StageRun, *, ip: str, http: aiohttp.ClientSession, port: int = METRICS_PORT) -> Progress | None:
    """Progress of a stage from its pod; None when the pod does not answer, or answers for another stage."""
    host = f"[{ip}]" if ":" in ip else ip
    try:
        async with http.get(
            f"http://{host}:{port}/metrics", timeout=aiohttp.ClientTimeout(total=TIMEOUT), allow_redirects=False
        ) as answer:
            if answer.status != 200:
                return None
            content = b""
            async for part in answer.content.iter_any():
                content += part
                if len(content) > _LARGEST_ANSWER:
                    raise ValueError(f"more than {_LARGEST_ANSWER} bytes")
        return parse(content.decode(), run=run)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        logger.debug("no progress of %s from %s: %s", run, ip, error)
        return None


def parse(text: str, *, run: StageRun) -> Progress | None:
    """Progress out of metrics in Prometheus' text format; raises ValueError when it is none."""
    values: dict[str, float] = {}
    told: Mapping[str, str] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == _INFO:
                told = sample.labels
            elif math.isfinite(sample.value):
                values[sample.name] = sample.value
    # Addresses of pods are used again: another stage may answer by now.
    if (told.get("stage"), told.get("hash")) != run:
        return None
    ratio = values.get(StageMetric.PROGRESS_RATIO)
    loss = values.get(StageMetric.LOSS)
    speed = values.get(StageMetric.TOKENS_PER_SECOND)
    return Progress(
        stage=run.stage,
        percent=None if ratio is None else max(0, min(100, math.floor(ratio * 100))),
        eta_seconds=_count(values.get(StageMetric.ETA_SECONDS)),
        step=_count(values.get(StageMetric.STEP)),
        total_steps=_count(values.get(StageMetric.STEPS)),
        loss=None if loss is None else f"{loss:.4f}",
        tokens_per_second=None if speed is None or speed < 0 else f"{speed:.1f}",
    )


def _count(value: float | None) -> int | None:
    return None if value is None else max(0, min(_LARGEST_COUNT, round(value)))

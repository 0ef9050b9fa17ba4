"""Progress of a running stage, and the Prometheus endpoint that tells it.

Only what the stage has set is exposed: a loss of 0 that nobody measured would be a lie in a graph.
Must import no torch: the server starts before the stage does.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tuneserve_pipeline.contract import StageMetric

log = logging.getLogger(__name__)

_HELP = {
    StageMetric.PROGRESS_RATIO: "Share of the stage that is done, 0 to 1.",
    StageMetric.STEP: "Steps (training) or rows (other stages) that are done.",
    StageMetric.STEPS: "Steps or rows in all.",
    StageMetric.ETA_SECONDS: "Seconds until the stage is expected to end.",
    StageMetric.LOSS: "Training loss of the last logged step.",
    StageMetric.LEARNING_RATE: "Learning rate of the last logged step.",
    StageMetric.GRADIENT_NORM: "Norm of the gradient before clipping, last logged step.",
    StageMetric.TOKENS_PER_SECOND: "Tokens, without padding, that go through the model in a second.",
    StageMetric.PEAK_GPU_MEMORY_BYTES: "Most GPU memory that this process has allocated, in bytes.",
}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is known at one moment; None: not known."""

    step: int | None = None
    total: int | None = None
    ratio: float | None = None
    """0 to 1."""
    eta_seconds: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_second: float | None = None


class Progress:
    """Where a stage is; set by the stage's thread, read by the metrics server's."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._now = Snapshot()
        self._first: tuple[float, float] | None = None

    def update(
        self,
        *,
        step: int | None = None,
        total: int | None = None,
        ratio: float | None = None,
        loss: float | None = None,
        learning_rate: float | None = None,
        gradient_norm: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Set what is given and keep the rest. `ratio` (0 to 1) follows from `step` and `total` unless given.

        The expected end follows from the speed since the first call, so a resumed run is not taken for a fast one.
        """
        with self._lock:
            old = self._now
            step = old.step if step is None else step
            total = old.total if total is None else total
            if ratio is None:
                ratio = min(1.0, step / total) if step is not None and total else old.ratio
            self._now = Snapshot(
                step=step,
                total=total,
                ratio=ratio,
                eta_seconds=self._eta(ratio),
                loss=old.loss if loss is None else loss,
                learning_rate=old.learning_rate if learning_rate is None else learning_rate,
                gradient_norm=old.gradient_norm if gradient_norm is None else gradient_norm,
                tokens_per_second=old.tokens_per_second if tokens_per_second is None else tokens_per_second,
            )

    def _eta(self, ratio: float | None) -> float | None:
        if ratio is None:
            return None
        now = self._clock()
        if self._first is None or ratio < self._first[1]:
            self._first = (now, ratio)
        since, begin = self._first
        return (now - since) / (ratio - begin) * (1.0 - ratio) if ratio > begin else None

    @property
    def now(self) -> Snapshot:
        with self._lock:
            return self._now


class ProgressCollector(Collector):
    """Turns a `Progress` into metric families at each scrape."""

    def __init__(self, *, progress: Progress, stage: str, kind: str, hash: str) -> None:
        self._progress = progress
        self._info = {"stage": stage, "kind": kind, "hash": hash}

    def collect(self) -> Iterator[Metric]:
        now = self._progress.now
        values: dict[StageMetric, float | None] = {
            StageMetric.PROGRESS_RATIO: now.ratio,
            StageMetric.STEP: now.step,
            StageMetric.STEPS: now.total,
            StageMetric.ETA_SECONDS: now.eta_seconds,
            StageMetric.LOSS: now.loss,
            StageMetric.LEARNING_RATE: now.learning_rate,
            StageMetric.GRADIENT_NORM: now.gradient_norm,
            StageMetric.TOKENS_PER_SECOND: now.tokens_per_second,
            StageMetric.PEAK_GPU_MEMORY_BYTES: peak_gpu_memory(),
        }
        yield InfoMetricFamily("tuneserve_stage", "The stage that runs here.", value=self._info)
        for metric, value in values.items():
            if value is not None:
                yield GaugeMetricFamily(metric.value, _HELP[metric], value=float(value))


def peak_gpu_memory() -> int | None:
    """Bytes; None as long as this process has not used a GPU. Never imports torch itself."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return None
    return sum(int(cuda.max_memory_allocated(device)) for device in range(cuda.device_count()))


def serve(*, collector: Collector, port: int) -> WSGIServer | None:
    """Serve `/metrics` from a daemon thread. Port 0 takes a free one.

    A port that is taken is no reason to fail a stage: it runs without metrics, and says so.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, _ = start_http_server(port, registry=registry)
    except OSError as error:
        log.warning("no metrics: port %d cannot be opened (%s)", port, error)
        return None
    log.info("metrics on port %d", server.server_port)
    return server

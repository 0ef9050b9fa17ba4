"""Runs one stage by the contract: reads the config, finds or makes the output, tells the outcome, picks the exit code.

A stage module exposes `run(job: StageRun) -> StageResult`, and `RESUMES = True` if a later run goes on from what an
earlier one left in `job.partial`; such a stage watches `job.interrupted` and raises `Interrupted` when it has saved.
Any other stage is stopped where it is by a signal, and starts over.
Must import no machine-learning library: a finished output is found in well under a second.
"""

import errno
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol, Self, cast

from pydantic import ValidationError

from tuneserve_pipeline import metrics, output
from tuneserve_pipeline.contract import (
    BASE_MODEL_PATH,
    DATASETS_PATH,
    HUB_TOKEN_PATH,
    METRICS_PORT,
    TERMINATION_PATH,
    ExitCode,
    Outcome,
    StageConfig,
    StageSpec,
    output_digest,
)
from tuneserve_pipeline.errors import Interrupted, InvalidConfig, OutOfMemory, StageFailure
from tuneserve_pipeline.metrics import Progress, ProgressCollector

log = logging.getLogger(__name__)

KINDS = ("prepare", "train", "merge", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Mounts:
    """Where a pod finds what is not on the artifacts claim; on a laptop, wherever the user says."""

    base_model: Path = Path(BASE_MODEL_PATH)
    datasets: Path = Path(DATASETS_PATH)
    hub_token: Path = Path(HUB_TOKEN_PATH)


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """What a stage works with."""

    config: StageConfig
    partial: Path
    """Outputs are written here; the runner renames it when the stage returns."""
    mounts: Mounts = field(default_factory=Mounts)
    progress: Progress = field(default_factory=Progress)
    interrupted: threading.Event = field(default_factory=threading.Event)
    """Set by SIGTERM: save, and raise `Interrupted`."""

    @property
    def spec(self) -> StageSpec:
        return self.config.spec

    def input(self, name: str) -> Path:
        """Output directory of a stage before this one, checked to be the very output that the config names."""
        told = self.config.inputs.get(name)
        if told is None:
            raise InvalidConfig(
                reason="InputMissing", message=f"inputs.{name}: the config of {self.config.name} does not name it"
            )
        directory = Path(told.path)
        outcome = output.recorded_outcome(directory)
        if outcome is None:
            raise InvalidConfig(
                reason="InputMissing",
                message=f"the output of {name} is not at {directory}: it was deleted from the artifacts claim. "
                f"Make it again with the annotation tuneserve.dev/rebuild: {name}",
            )
        if outcome.digest != told.digest:
            raise InvalidConfig(
                reason="InputChanged",
                message=f"the output of {name} at {directory} has the digest {outcome.digest}, expected {told.digest}. "
                f"Make it again with the annotation tuneserve.dev/rebuild: {name}",
            )
        return directory


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage found out; both end in the `Outcome`, so they are few and short."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


class StageModule(Protocol):
    def run(self, job: StageRun) -> StageResult: ...


def execute(
    *,
    kind: str,
    config_path: Path,
    mounts: Mounts | None = None,
    termination_path: Path | None = None,
    metrics_port: int = METRICS_PORT,
) -> int:
    """Run the stage of `config_path` and tell its outcome; returns the exit code."""
    os.umask(0o022)
    started = time.monotonic()
    name, hash = kind, ""
    try:
        with SignalGuard() as guard:
            config = read_config(config_path, kind=kind)
            name, hash = config.name, config.hash
            outcome = _run(config, mounts=mounts or Mounts(), metrics_port=metrics_port, guard=guard)
        code, error = int(ExitCode.DONE), None
    except Interrupted as stop:
        code, error = int(stop.code), stop.error
    except Exception as unexpected:
        failure = classify(unexpected)
        if failure.reason == "InternalError":
            log.exception("stage %s failed", name)
        code, error = int(failure.code), failure.error
    if error is not None:
        log.error("%s: %s", error.reason, error.message)
        outcome = Outcome(stage=name, hash=hash, seconds=round(time.monotonic() - started, 3), error=error)
    tell(outcome, termination_path or Path(TERMINATION_PATH))
    return code


def read_config(path: Path, *, kind: str) -> StageConfig:
    try:
        config = StageConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(reason="ConfigUnreadable", message=f"--config {path}: {error.strerror}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the file'}: {item['msg']}" for item in error.errors())
        raise InvalidConfig(reason="ConfigInvalid", message=f"{path}: {wrong}") from error
    if config.spec.kind != kind:
        raise InvalidConfig(
            reason="ConfigInvalid", message=f"{path} configures a stage of kind {config.spec.kind}, asked for is {kind}"
        )
    return config


def _run(config: StageConfig, *, mounts: Mounts, metrics_port: int, guard: "SignalGuard") -> Outcome:
    final = Path(config.output)
    recorded = output.recorded_outcome(final)
    if recorded is not None:
        log.info("%s %s is finished already", config.name, config.hash)
        return recorded
    started = time.monotonic()
    partial = Path(config.output + ".partial")
    job = StageRun(config=config, partial=partial, mounts=mounts, interrupted=guard.interrupted)
    metrics.serve(
        collector=ProgressCollector(progress=job.progress, stage=config.name, kind=config.spec.kind, hash=config.hash),
        port=metrics_port,
    )
    module = importlib.import_module(f"tuneserve_pipeline.{config.spec.kind}")
    resumes = bool(getattr(module, "RESUMES", False))
    if not resumes:
        shutil.rmtree(job.partial, ignore_errors=True)
    job.partial.mkdir(parents=True, exist_ok=True)
    log.info("%s %s starts", config.name, config.hash)
    guard.raises = not resumes
    try:
        result = cast(StageModule, module).run(job)
        guard.raises = False  # Nothing is worth saving but the output itself, and that is nearly there.
    except BaseException:
        if not resumes:
            shutil.rmtree(job.partial, ignore_errors=True)
        raise
    job.progress.update(ratio=1.0)
    return _finish(job, result=result, final=final, started=started)


def _finish(job: StageRun, *, result: StageResult, final: Path, started: float) -> Outcome:
    files = output.digest_files(job.partial)
    outcome = Outcome(
        stage=job.config.name,
        hash=job.config.hash,
        digest=output_digest(files),
        size_bytes=sum(file.size for file in files),
        seconds=round(time.monotonic() - started, 3),
        metrics=result.metrics,
        facts=result.facts,
    )
    outcome.to_message()  # Too long is a defect of the stage: found before the output is final.
    output.write_manifest(job.partial, config=job.config, outcome=outcome, files=files)
    output.publish(job.partial, final)
    log.info("%s %s is done in %.1f s", job.config.name, job.config.hash, outcome.seconds)
    return outcome


class SignalGuard:
    """SIGTERM and SIGINT set `interrupted` and, as long as `raises`, stop the stage where it is by `Interrupted`."""

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        self.raises = True

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        log.warning("%s: stopping", signal.Signals(number).name)
        first = not self.interrupted.is_set()
        self.interrupted.set()
        if self.raises and first:
            raise Interrupted("stopped by a signal; the next run starts this stage over")


def classify(error: Exception) -> StageFailure:
    """The failure behind an exception, looking through the chain of its causes."""
    if isinstance(error, StageFailure):
        return error
    chain = list(_causes(error))
    if any(_is_gpu_out_of_memory(cause) for cause in chain):
        return OutOfMemory(reason="OutOfGpuMemory", message=_first_line(error))
    for cause in chain:
        if (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(cause):
            return StageFailure(reason="DiskFull", message=_disk_full(cause))
    if any(isinstance(cause, MemoryError) or "DefaultCPUAllocator" in str(cause) for cause in chain):
        return StageFailure(
            reason="OutOfMemory",
            message=f"the memory of the machine did not suffice ({_first_line(error)}): raise the memory limit of the "
            "profile's stages, or take a smaller model or batch",
        )
    return StageFailure(reason="InternalError", message=f"{type(error).__name__}: {error}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _is_gpu_out_of_memory(error: BaseException) -> bool:
    # By name: torch may not be loaded, and the driver's own errors come as other types than torch's.
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    return "OutOfMemoryError" in names or any(
        sign in text for sign in ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _disk_full(error: BaseException) -> str:
    place = getattr(error, "filename", None)
    where = f" while writing {place}" if place else ""
    return (
        f"no space is left on the volume{where} ({_first_line(error)}): make the artifacts claim larger "
        "(spec.output.claim.size), or delete outputs on it that nothing serves; then run the stage again"
    )


def tell(outcome: Outcome, path: Path) -> None:
    """Leave the outcome in the termination message; on a machine without one, on standard output."""
    message = outcome.to_message()
    if not path.parent.is_dir() or (path == Path(TERMINATION_PATH) and not path.exists()):
        print(message, flush=True)
        return
    # In place: the kubelet mounted this very file, a renamed one would not be it.
    path.write_text(message, encoding="utf-8")


def configure_logging() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


__all__ = ["KINDS", "Mounts", "Progress", "StageResult", "StageRun", "execute"]

"""The runner: what every stage gets from it, whatever it computes."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from support.stages import ROOT, Finished, Workspace
from support.tiny import reviews, write_jsonl
from tuneserve_pipeline import output, stage
from tuneserve_pipeline.contract import (
    ExitCode,
    Manifest,
    MergeSpec,
    Outcome,
    PrepareSpec,
    StageConfig,
    StageMetric,
    output_digest,
)
from tuneserve_pipeline.errors import InvalidConfig, InvalidData, StageFailure, Unavailable
from tuneserve_pipeline.metrics import Progress, ProgressCollector, serve


@pytest.fixture
def data(workspace: Workspace) -> Path:
    return write_jsonl(workspace.datasets / "reviews" / "train.jsonl", reviews(30))


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_a_manifest_tells_everything_about_an_output(prepared: tuple[Workspace, Finished]) -> None:
    _, finished = prepared
    manifest = Manifest.model_validate_json((finished.directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest.outcome == finished.outcome
    assert {file.path for file in manifest.files} | {"manifest.json"} == {
        path.relative_to(finished.directory).as_posix() for path in output.list_files(finished.directory)
    }
    assert output_digest(output.digest_files(finished.directory)) == finished.outcome.digest
    assert finished.outcome.size_bytes == sum(file.size for file in manifest.files)
    assert "transformers" in manifest.versions


def test_outputs_may_be_read_by_another_user(prepared: tuple[Workspace, Finished]) -> None:
    workspace, finished = prepared
    for path in [finished.directory, finished.directory.parent]:
        assert path.stat().st_mode & 0o777 == 0o755
    for path in output.list_files(finished.directory):
        assert path.stat().st_mode & 0o777 == 0o644
    assert not list(workspace.artifacts.glob("prepare/*.partial"))


def test_private_files_are_opened_to_readers_and_the_group_bit_stays(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    (directory / "model").mkdir(parents=True)
    os.chmod(directory / "model", 0o2700)
    (directory / "model" / "weights").write_bytes(b"1")
    os.chmod(directory / "model" / "weights", 0o600)
    output.open_to_readers(directory)
    assert (directory / "model").stat().st_mode & 0o7777 == 0o2755
    assert (directory / "model" / "weights").stat().st_mode & 0o7777 == 0o644


def test_a_finished_stage_returns_its_recorded_outcome_and_loads_no_library(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    config = workspace.config(classification)
    first = workspace.run(config)
    assert first.code == 0, first.log
    data.unlink()  # would be missed if the stage ran again
    # Only what the contract needs may be imported: a trap stands for all that is slow.
    trap = workspace.root / "trap"
    for name in ("torch", "transformers", "tokenizers", "huggingface_hub"):
        (trap / name).mkdir(parents=True)
        (trap / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')", encoding="utf-8")
    environment = workspace.environment()
    environment["PYTHONPATH"] = f"{trap}:{environment['PYTHONPATH']}"
    process = subprocess.Popen(
        workspace.command(config), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    again = workspace.finish(config, process)
    assert (again.code, again.outcome) == (0, first.outcome)


@pytest.mark.parametrize("damage", ["delete", "cut", "manifest"])
def test_an_output_that_was_touched_is_not_taken_for_finished(
    workspace: Workspace, classification: PrepareSpec, data: Path, damage: str
) -> None:
    config = workspace.config(classification)
    directory = workspace.run_here(config).directory
    if damage == "delete":
        (directory / "test.jsonl").unlink()
    elif damage == "cut":
        (directory / "test.jsonl").write_bytes((directory / "test.jsonl").read_bytes()[:10])
    else:
        (directory / "manifest.json").unlink()
    again = workspace.run_here(config)
    assert (again.code, again.reason) == (1, "OutputDamaged")
    assert "tuneserve.dev/rebuild: prepare" in again.message
    assert damage == "manifest" or "test.jsonl" in again.message


def test_what_a_crashed_run_left_is_not_taken_over(
    workspace: Workspace, classification: PrepareSpec, data: Path
) -> None:
    config = workspace.config(classification)
    leftover = Path(config.output + ".partial")
    leftover.mkdir(parents=True)
    (leftover / "half.jsonl").write_text('{"half', encoding="utf-8")
    finished = workspace.run_here(config)
    assert finished.code == 0
    assert not (finished.directory / "half.jsonl").exists()
    assert finished.outcome.digest == output_digest(output.digest_files(finished.directory))


# --- a stage of the tests' own under the real runner ------------------------------------------------------------------

STAGE = """
import os, time
from tuneserve_pipeline.errors import Interrupted
from tuneserve_pipeline.stage import StageResult

RESUMES = {resumes}

def run(job):
    (job.partial / "saved.txt").open("a").write("x")
    {body}
    return StageResult(metrics={{"loss": 0.5}}, facts={{"saved": (job.partial / "saved.txt").read_text()}})
"""


@pytest.fixture
def own_stage(tmp_path: Path) -> Any:
    """Starts a stage whose `run` is the given code, under the real runner in a process of its own."""

    def start(body: str, *, resumes: bool = False) -> tuple[subprocess.Popen[str], StageConfig, Path]:
        package = tmp_path / "package"
        if not package.exists():
            shutil.copytree(
                ROOT / "pipeline" / "tuneserve_pipeline",
                package / "tuneserve_pipeline",
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        code = STAGE.format(resumes=resumes, body=body)
        (package / "tuneserve_pipeline" / "merge.py").write_text(code, encoding="utf-8")
        config = StageConfig(name="merge", hash="0" * 16, spec=MergeSpec(), artifacts=str(tmp_path / "artifacts"))
        (tmp_path / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        termination = tmp_path / "termination-log"
        termination.write_text("", encoding="utf-8")
        command = [sys.executable, "-m", "tuneserve_pipeline", "merge", "--config", str(tmp_path / "config.json")]
        command += ["--termination-log", str(termination), "--metrics-port", "0"]
        environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        return process, config, termination

    return start


def end(started: tuple[subprocess.Popen[str], StageConfig, Path]) -> tuple[int, Outcome, Path]:
    process, config, termination = started
    _, log = process.communicate(timeout=60)
    assert termination.read_text(encoding="utf-8"), log
    outcome = Outcome.model_validate_json(termination.read_text(encoding="utf-8"))
    return process.returncode, outcome, Path(config.output)


def wait_for(path: Path, *, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_an_unexpected_exception_is_told_with_its_text(own_stage: Any) -> None:
    code, outcome, final = end(own_stage("raise KeyError('surprise')"))
    assert code == 1
    assert outcome.error is not None and outcome.error.reason == "InternalError"
    assert outcome.error.message == "KeyError: 'surprise'"
    assert not final.exists() and not Path(f"{final}.partial").exists()


def test_a_signal_stops_a_stage_that_cannot_resume_where_it_is(own_stage: Any) -> None:
    started = own_stage("(job.partial / 'ready').touch(); time.sleep(120)")
    process, config, _ = started
    wait_for(Path(f"{config.output}.partial") / "ready")
    process.send_signal(signal.SIGTERM)
    code, outcome, final = end(started)
    assert code == ExitCode.INTERRUPTED
    assert outcome.error is not None and outcome.error.reason == "Interrupted"
    assert not final.exists() and not Path(f"{final}.partial").exists()


def test_a_signal_lets_a_stage_that_resumes_save_and_the_next_run_goes_on(own_stage: Any) -> None:
    body = "(job.partial / 'ready').touch(); job.interrupted.wait(60) and None; raise Interrupted()"
    started = own_stage(body, resumes=True)
    process, config, _ = started
    wait_for(Path(f"{config.output}.partial") / "ready")
    process.send_signal(signal.SIGTERM)
    code, _, _ = end(started)
    assert code == ExitCode.INTERRUPTED
    code, outcome, final = end(own_stage("pass", resumes=True))
    assert (code, outcome.facts["saved"]) == (0, "xx")
    assert (final / "saved.txt").read_text(encoding="utf-8") == "xx"


def test_a_kill_in_the_middle_leaves_no_output_and_the_next_run_starts_over(own_stage: Any) -> None:
    started = own_stage("(job.partial / 'ready').touch(); time.sleep(120)")
    process, config, _ = started
    wait_for(Path(f"{config.output}.partial") / "ready")
    process.kill()
    process.communicate(timeout=60)
    assert not Path(config.output).exists()
    code, outcome, final = end(own_stage("pass"))
    assert (code, outcome.facts["saved"]) == (0, "x")
    assert not (final / "ready").exists()


def test_a_kill_while_the_manifest_is_written_leaves_no_output(own_stage: Any) -> None:
    # The write of the manifest is made to last for ever: half of it is on the disk when the kill comes.
    body = (
        "from tuneserve_pipeline import output; "
        "output.write_manifest = lambda d, **k: ((d / 'manifest.json.partial').write_text('{'), time.sleep(120))"
    )
    started = own_stage(body)
    process, config, _ = started
    wait_for(Path(f"{config.output}.partial") / "manifest.json.partial")
    process.kill()
    process.communicate(timeout=60)
    assert not Path(config.output).exists()
    code, outcome, final = end(own_stage("pass"))
    assert code == 0 and not (final / "manifest.json.partial").exists()
    assert outcome.digest == output_digest(output.digest_files(final))


def test_a_full_disk_is_said_with_what_to_do(own_stage: Any) -> None:
    code, outcome, _ = end(own_stage("f = open('/dev/full', 'w'); f.write('x'); f.flush()"))
    assert code == 1
    assert outcome.error is not None and outcome.error.reason == "DiskFull"
    assert "spec.output.claim.size" in outcome.error.message


def test_too_many_facts_are_found_before_the_output_is_final(own_stage: Any) -> None:
    body = "return StageResult(facts={'much': 'x' * 5000})"
    code, outcome, final = end(own_stage(body))
    assert code == 1 and outcome.error is not None and "too many" in outcome.error.message
    assert not final.exists()


# --- configs, errors, signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        (None, "ConfigUnreadable", "No such file"),
        ("{", "ConfigInvalid", "JSON"),
        ('{"name": "prepare"}', "ConfigInvalid", "hash"),
        (
            json.dumps({"name": "m", "hash": "0", "spec": {"kind": "merge", "typo": 1}}),
            "ConfigInvalid",
            "spec.merge.typo",
        ),
        (json.dumps({"name": "m", "hash": "0", "spec": {"kind": "merge"}}), "ConfigInvalid", "asked for is prepare"),
    ],
)
def test_a_config_that_cannot_be_read_is_told(tmp_path: Path, content: str | None, reason: str, says: str) -> None:
    path, termination = tmp_path / "config.json", tmp_path / "termination-log"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert stage.execute(kind="prepare", config_path=path, termination_path=termination) == ExitCode.INVALID_CONFIG
    outcome = Outcome.model_validate_json(termination.read_text(encoding="utf-8"))
    assert outcome.stage == "prepare"
    assert outcome.error is not None and outcome.error.reason == reason
    assert says in outcome.error.message


def test_without_a_termination_log_the_outcome_goes_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.execute(kind="merge", config_path=tmp_path / "absent", termination_path=tmp_path / "no" / "such" / "log")
    outcome = Outcome.model_validate_json(capsys.readouterr().out)
    assert outcome.error is not None and outcome.error.reason == "ConfigUnreadable"


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), 85, "OutOfGpuMemory"),
        (RuntimeError("CUDA error: out of memory"), 85, "OutOfGpuMemory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 85, "OutOfGpuMemory"),
        (OSError(errno.ENOSPC, "No space left on device", "/artifacts/x"), 1, "DiskFull"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "DiskFull"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "DiskFull"),
        (MemoryError(), 1, "OutOfMemory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "OutOfMemory"),
        (ValueError("anything"), 1, "InternalError"),
        (InvalidConfig(reason="A", message="a"), 64, "A"),
        (InvalidData(reason="B", message="b"), 65, "B"),
        (Unavailable(reason="C", message="c"), 69, "C"),
        (StageFailure(reason="D", message="d"), 1, "D"),
    ],
)
def test_exceptions_become_exit_codes_and_reasons(error: Exception, code: int, reason: str) -> None:
    found = stage.classify(error)
    assert (found.code, found.reason) == (code, reason)


def test_the_cause_behind_an_exception_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as cause:
            raise RuntimeError("could not save") from cause
    except RuntimeError as error:
        assert stage.classify(error).reason == "DiskFull"


def test_an_input_that_changed_or_went_is_refused(prepared: tuple[Workspace, Finished], tmp_path: Path) -> None:
    workspace, prepare = prepared
    config = workspace.config(MergeSpec(), parents={"prepare": prepare})
    job = stage.StageRun(config=config, partial=tmp_path)
    assert job.input("prepare") == prepare.directory
    with pytest.raises(InvalidConfig, match="does not name it"):
        job.input("train")
    told = config.inputs["prepare"]
    for change, reason in [({"digest": "sha256:0"}, "InputChanged"), ({"path": "/nowhere"}, "InputMissing")]:
        inputs = {"prepare": told.model_copy(update=change)}
        other = stage.StageRun(config=config.model_copy(update={"inputs": inputs}), partial=tmp_path)
        with pytest.raises(InvalidConfig, match="rebuild: prepare") as failure:
            other.input("prepare")
        assert failure.value.reason == reason


# --- progress --------------------------------------------------------------------------------------------------------


def read_metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_only_what_is_known_is_exposed() -> None:
    progress = Progress()
    server = serve(collector=ProgressCollector(progress=progress, stage="t", kind="train", hash="h"), port=0)
    assert server is not None
    try:
        info = 'tuneserve_stage_info{hash="h",kind="train",stage="t"}'
        assert read_metrics(server.server_port) == {info: 1.0}
        progress.update(step=3, total=12, loss=1.5, learning_rate=2e-4, gradient_norm=0.7, tokens_per_second=100)
        assert read_metrics(server.server_port) == {
            info: 1.0,
            StageMetric.PROGRESS_RATIO.value: 0.25,
            StageMetric.STEP.value: 3.0,
            StageMetric.STEPS.value: 12.0,
            StageMetric.LOSS.value: 1.5,
            StageMetric.LEARNING_RATE.value: 2e-4,
            StageMetric.GRADIENT_NORM.value: 0.7,
            StageMetric.TOKENS_PER_SECOND.value: 100.0,
        }
    finally:
        server.shutdown()
        server.server_close()


def test_the_expected_end_follows_from_the_speed_of_this_run() -> None:
    now = 100.0
    progress = Progress(clock=lambda: now)
    progress.update(step=30, total=50)  # resumed: nothing is known of the speed yet
    assert progress.now.eta_seconds is None
    now = 110.0
    progress.update(step=35)
    assert progress.now.eta_seconds == pytest.approx(30.0)
    assert (progress.now.step, progress.now.total, progress.now.ratio) == (35, 50, 0.7)


def test_a_port_that_is_taken_does_not_stop_a_stage() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        collector = ProgressCollector(progress=Progress(), stage="t", kind="train", hash="h")
        assert serve(collector=collector, port=taken.getsockname()[1]) is None

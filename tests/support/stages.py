"""Runs stages as a Job does: a process of its own, one config file, an outcome in a termination file."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuneserve_pipeline import stage
from tuneserve_pipeline.contract import Outcome, Runtime, StageConfig, StageInput, StageSpec, input_hash

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Finished:
    code: int
    outcome: Outcome
    directory: Path
    """Where the output is, if the stage ended well."""
    log: str

    @property
    def message(self) -> str:
        assert self.outcome.error is not None, self.log
        return self.outcome.error.message

    @property
    def reason(self) -> str:
        assert self.outcome.error is not None, self.log
        return self.outcome.error.reason

    def json(self, name: str) -> dict[str, object]:
        return json.loads((self.directory / name).read_text(encoding="utf-8"))

    def rows(self, name: str) -> list[dict[str, object]]:
        """What stands in a file of JSON lines or of Parquet."""
        if name.endswith(".parquet"):
            from pyarrow.parquet import read_table

            return read_table(self.directory / name).to_pylist()
        return [json.loads(line) for line in (self.directory / name).read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """One user's volumes: the artifacts claim, the base model's claim and the data claims."""

    root: Path
    base_model: Path

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def termination(self) -> Path:
        return self.root / "termination-log"

    def config(
        self,
        spec: StageSpec,
        *,
        name: str | None = None,
        parents: Mapping[str, Finished] | None = None,
        runtime: Runtime | None = None,
    ) -> StageConfig:
        """Config of a stage, with the hash and the inputs that the control plane would give it."""
        inputs = {
            parent: StageInput(path=str(done.directory), digest=done.outcome.digest or "")
            for parent, done in (parents or {}).items()
        }
        return StageConfig(
            name=name or spec.kind,
            hash=input_hash(spec=spec, parents={parent: given.digest for parent, given in inputs.items()}),
            spec=spec,
            inputs=inputs,
            artifacts=str(self.artifacts),
            runtime=runtime or Runtime(device="cpu"),
        )

    def write(self, config: StageConfig) -> Path:
        """The config as a file, and an empty termination message: what a pod starts with."""
        self.artifacts.mkdir(parents=True, exist_ok=True)
        path = self.root / f"{config.name}.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        self.termination.write_text("", encoding="utf-8")
        return path

    def command(self, config: StageConfig) -> list[str]:
        path = self.write(config)
        return [
            *(sys.executable, "-m", "tuneserve_pipeline", config.spec.kind),
            *("--config", str(path)),
            *("--base-model-root", str(self.base_model)),
            *("--datasets-root", str(self.datasets)),
            *("--hub-token", str(self.root / "hub-token")),
            *("--termination-log", str(self.termination)),
            *("--metrics-port", "0"),
        ]

    def environment(self) -> dict[str, str]:
        """Nothing of the machine's hub settings or proxies reaches a stage under test."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
        proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
        kept = {name: value for name, value in kept.items() if name.upper() not in proxies}
        return kept | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "pipeline"), os.environ.get("PYTHONPATH")])),
            "HF_HOME": str(self.root / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def start(self, config: StageConfig) -> subprocess.Popen[str]:
        """Start a stage and return at once; its log is in the pipe `stderr`."""
        return subprocess.Popen(
            self.command(config), env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, config: StageConfig, process: subprocess.Popen[str], *, timeout: float = 240) -> Finished:
        """Wait for a stage that was started; the outcome is what it left in the termination file."""
        stdout, stderr = process.communicate(timeout=timeout)
        told = self.termination.read_text(encoding="utf-8")
        assert told, f"no termination message, exit code {process.returncode}\n{stdout}\n{stderr}"
        return Finished(
            code=process.returncode,
            outcome=Outcome.model_validate_json(told),
            directory=Path(config.output),
            log=stderr,
        )

    def run(self, config: StageConfig, *, timeout: float = 240) -> Finished:
        return self.finish(config, self.start(config), timeout=timeout)

    def run_here(self, config: StageConfig) -> Finished:
        """Run a stage in this process: the same runner, without the seconds that an interpreter takes to start."""
        path = self.write(config)
        code = stage.execute(
            kind=config.spec.kind,
            config_path=path,
            mounts=stage.Mounts(base_model=self.base_model, datasets=self.datasets, hub_token=self.root / "hub-token"),
            termination_path=self.termination,
            metrics_port=0,
        )
        outcome = Outcome.model_validate_json(self.termination.read_text(encoding="utf-8"))
        return Finished(code=code, outcome=outcome, directory=Path(config.output), log=str(outcome.error))

"""The real operator as a process against a real API server: started, killed and asked from outside, as in a pod."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

Lines = list[dict[str, Any]]


class OperatorProcess:
    """One operator; `start` again after its end is a new process, as a restarted container is."""

    def __init__(
        self, *, directory: Path, kubeconfig: Path, config: Mapping[str, Any], lease_namespace: str, name: str
    ) -> None:
        self._directory = directory
        self.config = directory / f"{name}.yaml"
        self.config.write_text(yaml.safe_dump(dict(config)))
        self._log = directory / f"{name}.log"
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "POD_NAMESPACE": lease_namespace,
            "POD_NAME": name,
            "PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'pipeline'}",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.name = name
        self.lease_namespace = lease_namespace
        self.starts = 0
        self._offset = 0

    def start(self) -> None:
        """Start it; returns at once."""
        assert not self.alive(), f"operator {self.name} runs already"
        self._offset = self._log.stat().st_size if self._log.exists() else 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tuneserve", "--config", self.config, "--host", "127.0.0.1", "--port", "0"],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=self._log.open("ab"),
        )
        self.starts += 1

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL: it gets to say and do nothing more."""
        self._send(signal.SIGKILL)
        self.wait()

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def freeze(self) -> None:
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def wait(self, *, timeout: float = 60) -> int:
        """Its exit code, once it has ended."""
        assert self._process is not None
        return self._process.wait(timeout=timeout)

    def wait_ready(self, *, timeout: float = 60) -> None:
        self._poll("/readyz", timeout=timeout)

    def wait_log(self, text: str, *, timeout: float = 60) -> None:
        """Wait for a message of the present process."""
        deadline = time.monotonic() + timeout
        while not any(text in line.get("message", "") for line in self.lines()):
            assert time.monotonic() < deadline, f"operator {self.name} never said {text!r}:\n{self.tail()}"
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of one of its own endpoints."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port()}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all series of that name that carry the labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = self.get("/metrics")[1].splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.split("{")[0].split(" ")[0] == name and all(text in line for text in wanted)
        )

    def lines(self) -> Lines:
        """What the present process has logged: JSON, one object a line."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as log:
            log.seek(self._offset)
            text = log.read().decode()
        # The last line may be half written.
        return [json.loads(line) for line in text.split("\n")[:-1] if line.startswith("{")]

    def tail(self, *, characters: int = 4000) -> str:
        return self._log.read_text()[-characters:] if self._log.exists() else ""

    def _port(self) -> int:
        for line in self.lines():
            if line["message"].startswith("health and metrics on port "):
                return int(line["message"].rsplit(" ", 1)[1])
        raise ConnectionError(f"operator {self.name} has not opened its port yet:\n{self.tail()}")

    def _poll(self, path: str, *, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            assert self.alive(), f"operator {self.name} has ended:\n{self.tail()}"
            try:
                if self.get(path)[0] == 200:
                    return
            except OSError:
                pass
            assert time.monotonic() < deadline, f"{path} of operator {self.name} is not 200:\n{self.tail()}"
            time.sleep(0.1)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

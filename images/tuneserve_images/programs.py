"""The programs that build: they are found or installed, run in a mount namespace of their own, and end with the build.

The namespace is why an interrupted build leaves no mounts behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneserve_images.recipes import BuildError

DEBIAN_TOOLS = {"buildah": "buildah", "debootstrap": "debootstrap"}
LAST_LINES = 20


def install_missing() -> list[str]:
    """Install the Debian packages whose programs are missing; returns their names."""
    if os.geteuid() != 0:
        raise BuildError("images/build needs root: it mounts file systems. Run it with sudo")
    missing = [package for package, program in DEBIAN_TOOLS.items() if not _which(program)]
    if not missing:
        return []
    if not shutil.which("apt-get"):
        raise BuildError(f"{', '.join(missing)} must be installed by hand: this machine has no apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"apt-get {words[0]} failed for {', '.join(missing)}: {done.stderr.strip()[-500:]}")
    return missing


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def uv_binary() -> Path:
    """The binary itself: a shim, as some Python installations have, does not run inside an image."""
    try:
        done = subprocess.run(["uv", "run", "--no-project", "printenv", "UV"], capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError("uv is missing: install it with `pip install uv`") from None
    if done.returncode:
        raise BuildError(f"uv does not run: {done.stderr.strip()}")
    return Path(done.stdout.strip())


def uv_cache() -> Path:
    """Where uv keeps its downloads on this machine."""
    return Path(subprocess.run(["uv", "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip())


def apart(words: Sequence[str | Path]) -> list[str]:
    """The command in a mount namespace of its own: what it mounts goes with it."""
    return ["unshare", "--mount", "--propagation", "private", *map(str, words)]


class Runner:
    """Runs programs, each with a log file; `stop` ends those that run."""

    def __init__(self, *, logs: Path) -> None:
        self.logs = logs
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, words: Sequence[str | Path], *, log: str, environment: Mapping[str, str] | None = None, cwd: Path
    ) -> None:
        """Raises BuildError with the end of the log when the program fails."""
        file = self.logs / f"{log}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as output:
            with self._lock:
                if self._stopped:
                    raise BuildError("stopped")
                process = subprocess.Popen(
                    apart(words),
                    cwd=cwd,
                    env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                self._running.add(process)
            try:
                code = process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
        if code and self._stopped:
            raise BuildError("stopped")
        if code:
            end = "\n".join(file.read_text(errors="replace").splitlines()[-LAST_LINES:])
            raise BuildError(f"{log}: {Path(words[0]).name} ended with {code}; the end of {file}:\n{end}")

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

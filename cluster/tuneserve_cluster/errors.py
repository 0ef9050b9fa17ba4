"""The one exception that users see: what is wrong, what to do, and the log's last words."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

LAST_LINES = 15


class ClusterError(Exception):
    """A sentence for a human; `log` names the file whose end explains it."""

    def __init__(self, sentence: str, log: Path | None = None) -> None:
        super().__init__(sentence)
        self.log = log

    def report(self) -> str:
        text = f"error: {self}"
        if self.log is not None and self.log.exists():
            lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            text += f"\nlast lines of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)
        return text


def run(
    command: Sequence[str | Path],
    failure: str,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    timeout: float | None = None,
) -> str:
    """Standard output of a command; when it fails, `failure` and what the command said."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env=None if env is None else dict(env),
            cwd=cwd,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise ClusterError(f"{failure}: the program {command[0]} is missing; run `cluster build`") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{failure}: {Path(command[0]).name} took longer than {timeout:.0f} s") from None
    if done.returncode != 0:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
        raise ClusterError(f"{failure}: {Path(command[0]).name} ended with {done.returncode}\n{said}")
    return done.stdout

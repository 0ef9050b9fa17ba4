"""What the demo shows of a FineTune while it runs: one line that changes, or plain lines where there is no terminal."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TextIO

from tuneserve_demo.tools import condition, minutes

PLAIN_SECONDS = 20.0


def describe(found: Mapping[str, Any]) -> str:
    """What goes on in a FineTune or ModelServe, as one line; empty while nothing is known."""
    status = found.get("status", {})
    if "stages" not in status:
        return str(condition(found, "Reconciling").get("message", ""))
    progress = status.get("progress") or {}
    running = [stage["name"] for stage in status["stages"] if stage["state"] == "Running"]
    name = progress.get("stage") or (running[0] if running else "")
    if not name:
        waiting = [stage for stage in status["stages"] if stage["state"] == "Pending"]
        return f"waiting for {waiting[0]['name']}" if waiting else ""
    parts = [f"{name:<16}"]
    if "percent" in progress:
        parts.append(f"{bar(progress['percent'])} {progress['percent']:>3} %")
    if "totalSteps" in progress:
        parts.append(f"step {progress.get('step', 0)}/{progress['totalSteps']}")
    # The last loss stays in the status when later stages run.
    if "loss" in progress and name == "train":
        parts.append(f"loss {float(progress['loss']):.3f}")
    if "tokensPerSecond" in progress:
        parts.append(f"{float(progress['tokensPerSecond']):.0f} tokens/s")
    if "etaSeconds" in progress:
        parts.append(f"{minutes(progress['etaSeconds'])} left")
    return "  ".join(parts)


def bar(percent: int, *, width: int = 20) -> str:
    full = max(0, min(width, percent * width // 100))
    return "█" * full + "░" * (width - full)


def ended(found: Mapping[str, Any]) -> dict[str, str]:
    """One sentence for each stage that has ended, by its name."""
    lines = {}
    for stage in found.get("status", {}).get("stages", []):
        if stage["state"] == "Succeeded":
            lines[stage["name"]] = f"{stage['name']:<16}  done{_duration(stage)}"
        elif stage["state"] == "Failed":
            lines[stage["name"]] = f"{stage['name']:<16}  failed: {stage.get('message', '')}"
    return lines


def _duration(stage: Mapping[str, Any]) -> str:
    if not stage.get("job"):
        return " before, found again"
    try:
        start, end = (datetime.fromisoformat(stage[key]) for key in ("startTime", "completionTime"))
    except KeyError:
        return ""
    return f" in {minutes((end - start).total_seconds())}"


class ProgressLine:
    """Shows a FineTune each time it is looked at; stages that end stay on the screen."""

    def __init__(
        self, *, stream: TextIO = sys.stdout, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream = stream
        self.terminal = stream.isatty() if terminal is None else terminal
        self.clock = clock
        self._told: dict[str, str] = {}
        self._last = ""
        self._last_time = float("-inf")

    def show(self, found: Mapping[str, Any]) -> None:
        for name, line in ended(found).items():
            if self._told.get(name) != line:
                self._told[name] = line
                self._print(line)
        line = describe(found)
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write(f"\r\033[K{line[:width]}")
        elif line and line != self._last and self._due(line):
            self._print(line)
            self._last, self._last_time = line, self.clock()
        self.stream.flush()

    def close(self) -> None:
        """Leave the line that changes."""
        if self.terminal:
            self.stream.write("\r\033[K")
            self.stream.flush()

    def _due(self, line: str) -> bool:
        """A new stage is told at once, news of the same one now and then."""
        return line.split(" ", 1)[0] != self._last.split(" ", 1)[0] or self.clock() - self._last_time >= PLAIN_SECONDS

    def _print(self, line: str) -> None:
        self.stream.write(f"\r\033[K{line}\n" if self.terminal else f"{line}\n")

"""Background processes that outlive the command that started them, found again by pid files.

A pid alone says little: after a reboot, or days, it may be somebody else's. A pid
file therefore also holds the process's start time, and only a process with both
counts as ours.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneserve_cluster.errors import ClusterError

OPEN_FILES = 1 << 20


@dataclass(frozen=True)
class Process:
    """A process of this machine, told apart from later ones with the same number."""

    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> Process | None:
        fields = _stat(pid)
        return Process(pid, fields[19]) if fields and fields[0] != "Z" else None

    @staticmethod
    def read(path: Path) -> Process | None:
        """The process that a pid file names, if it lives."""
        try:
            pid, started = path.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        found = Process.of(int(pid))
        return found if found is not None and found.started == started else None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{self.pid} {self.started}\n")

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def memory_mib(self) -> float:
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0.0
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def kill(self, patience: float = 20.0) -> None:
        """Ends it and waits until the kernel has taken it away (for PID 1 of a namespace: with all in it)."""
        if not self.alive():
            return
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if not wait_until(lambda: not self.alive(), patience):
            raise ClusterError(f"process {self.pid} does not end; look at /proc/{self.pid}/stack")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the program's name, which may itself hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def all_pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def child_of(parent: int) -> int | None:
    """The first child of a process (/proc/<pid>/task/*/children is not compiled into every kernel)."""
    for pid in all_pids():
        fields = _stat(pid)
        if fields and fields[1] == str(parent):
            return pid
    return None


def in_namespace_of(holder: Process, program: Path) -> list[Process]:
    """Processes that run this program in the holder's PID namespace itself (not in a container's, below it)."""
    found = []
    for pid in all_pids():
        try:
            same = os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{holder.pid}/ns/pid")
            if same and os.readlink(f"/proc/{pid}/exe") == str(program) and (process := Process.of(pid)) is not None:
                found.append(process)
        except OSError:
            continue
    return found


def with_word(word: str) -> list[Process]:
    """Processes, other than this one, with this text in their command line."""
    found = []
    for pid in all_pids():
        if pid == os.getpid():
            continue
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command and (process := Process.of(pid)) is not None:
            found.append(process)
    return found


def wait_until(condition: Callable[[], bool], timeout: float, pause: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
    return True


def raise_file_limit() -> None:
    """containerd and etcd want many open files; children inherit this."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def detach(command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, so that a Ctrl-C in the terminal does not reach it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            cwd="/",
            start_new_session=True,
        )


def child_running(started: subprocess.Popen[bytes], patience: float = 10.0) -> Process | None:
    """The child that `unshare` or `nsenter` forks: the true process, of which they are only the waiting parent."""
    end = time.monotonic() + patience
    while started.poll() is None and time.monotonic() < end:
        pid = child_of(started.pid)
        if pid is not None and (process := Process.of(pid)) is not None:
            return process
        time.sleep(0.01)
    return None

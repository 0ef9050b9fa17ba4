"""What this pod may use of its machine, and the settings that libraries read once, when they are loaded.

The libraries ask for the cores of the host; a pod that may use two of 64 and starts 64 threads crawls.
Must import neither torch nor transformers: `configure_process` has to come before them.
"""

import math
import os
import shutil
import sysconfig
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMORY_INFO = Path("/proc/meminfo")
#: A limit of cgroup v1 from here on (bytes) means that there is none.
_NO_LIMIT = 1 << 60


def configure_process() -> None:
    """No hub, no telemetry, as many threads as this pod has cores. What the environment says already stays."""
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(cpu_count()),
        # A thread that spins at a barrier takes the core that its partner waits for: on a busy node a step took four
        # times as long, and three times the processor time.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # One process, one device: several visible ones would be wrapped in DataParallel.
        "CUDA_VISIBLE_DEVICES": "0",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def cpu_count(*, cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use: the pod's limit, rounded up, or else those it may run on."""
    allowed = len(os.sched_getaffinity(0))
    quota, period = _cpu_limit(cgroups)
    return max(1, min(allowed, math.ceil(quota / period))) if quota > 0 and period > 0 else allowed


def lacks_for_triton(*, headers: Path | None = None) -> str | None:
    """What of a compiler this image has not; Triton compiles what starts its kernels, at run time.

    `headers`: where Python's are; none: where this Python says.
    """
    named = os.environ.get("CC")
    if not (shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang")):
        return "C compiler (gcc or clang)"
    folder = headers or Path(sysconfig.get_paths()["include"])
    return None if (folder / "Python.h").is_file() else f"{folder}/Python.h"


def memory_available(*, cgroups: Path = CGROUPS, memory_info: Path = MEMORY_INFO) -> int:
    """Bytes of main memory that this process may still take."""
    free = _memory_info(memory_info)
    for base, limit_name, usage_name, cache in (
        (cgroups, "memory.max", "memory.current", "inactive_file"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number(base / limit_name), _number(base / usage_name)
        if limit is not None and usage is not None and limit < _NO_LIMIT:
            # Cached file content counts as used, but gives way.
            return max(0, min(free, limit - usage + _stat(base / "memory.stat", cache)))
    return free


def _cpu_limit(cgroups: Path) -> tuple[int, int]:
    """Microseconds of processor time in a period, and the period; zeros where there is no limit."""
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
        return (0, 0) if quota == "max" else (int(quota), int(period))
    except (OSError, ValueError):
        quota_v1, period_v1 = _number(cgroups / "cpu/cpu.cfs_quota_us"), _number(cgroups / "cpu/cpu.cfs_period_us")
        return (quota_v1 or 0, period_v1 or 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for name, value in map(str.split, lines) if name == key), 0)


def _memory_info(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{path} does not tell MemAvailable")

"""The cgroup under which the kubelet puts all pods, on cgroup v1, hybrid and v2 machines.

The kubelet makes the folders of pods itself but expects their root to exist. On
v1 it must exist in every hierarchy, and a new cpuset folder is unusable until it
is told which CPUs and memory nodes it has; on v2 the controllers must be enabled
from the top down.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.process import wait_until

V2_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io", "hugetlb")


def hierarchies() -> list[tuple[Path, str]]:
    """(mount point, type) of every mounted cgroup hierarchy."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            found.append((Path(where), kind))
    return found


def is_v2() -> bool:
    """Whether the machine has nothing but cgroup v2 (a hybrid machine counts as v1: v2 has no controllers there)."""
    return all(kind == "cgroup2" for _, kind in hierarchies())


def create(name: str) -> None:
    """Makes the root folder of this name, ready for the kubelet."""
    mounted = hierarchies()
    if not mounted:
        raise ClusterError("no cgroup hierarchy is mounted: mount /sys/fs/cgroup before starting a kubelet")
    for where, kind in mounted:
        folder = where / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ClusterError(
                f"cannot make {folder}: {error.strerror}; a kubelet needs a writable /sys/fs/cgroup"
            ) from None
        if kind == "cgroup2" and is_v2():
            _enable(where)
            _enable(folder)
        elif (folder / "cpuset.cpus").exists() and (where / "cpuset.cpus").exists():
            for setting in ("cpuset.cpus", "cpuset.mems"):
                (folder / setting).write_text((where / setting).read_text())


def _enable(folder: Path) -> None:
    available = (folder / "cgroup.controllers").read_text().split()
    for controller in V2_CONTROLLERS:
        if controller not in available:
            continue
        try:
            (folder / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise ClusterError(
                    f"{folder} holds processes, so its controllers cannot be given to pods: "
                    "run it on the machine itself, or in a container with --cgroupns=host"
                ) from None
            raise ClusterError(f"cannot enable the {controller} controller in {folder}: {error.strerror}") from None


def left(name: str) -> list[Path]:
    """The root folders of this name that exist."""
    return [where / name for where, _ in hierarchies() if (where / name).is_dir()]


def remove(name: str, patience: float = 10.0) -> None:
    """Removes the folders, deepest first; the kernel needs a moment after the last process has ended."""

    def gone() -> bool:
        for root in left(name):
            for folder, _, _ in os.walk(root, topdown=False):
                try:
                    os.rmdir(folder)
                except OSError:
                    pass
        return not left(name)

    wait_until(gone, patience, pause=0.1)

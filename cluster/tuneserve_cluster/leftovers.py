"""What a cluster could leave on the machine, and whether it did.

`down` looks for these after it has removed them: a stray process or mount that
nobody sees is found months later, when the disk is full.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tuneserve_cluster import cgroups
from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.node import NAMESPACES
from tuneserve_cluster.process import Process, all_pids, wait_until
from tuneserve_cluster.settings import Cluster


def is_component(process: Process, cluster: Cluster) -> bool:
    """Whether it runs one of our binaries (a user's editor may have a file of the state folder open)."""
    try:
        program = Path(f"/proc/{process.pid}/exe").readlink()
    except OSError:
        return False
    return (cluster.cache / "bin") in program.parents


def mounts_below(folder: Path) -> list[str]:
    """The mount points below a folder, as this process sees them."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if Path(point) == folder or folder in Path(point).parents]


def assert_unmounted(cluster: Cluster) -> None:
    """Before the state folder is removed: what is mounted in it would be removed too."""
    if mounted := mounts_below(cluster.state):
        raise ClusterError(
            f"{mounted[0]} is still mounted, so {cluster.state} stays: unmount it, then run `cluster down` again"
        )


def own_namespaces(cluster: Cluster) -> frozenset[str]:
    """Its namespaces, but those whose number the kernel has since given to another cluster.

    That happens when a cluster died with the machine and was never told to go down.
    """
    own = cluster.namespaces_file
    if not own.exists():
        return frozenset()
    began = own.stat().st_mtime
    later = [file for file in own.parent.parent.glob(f"*/{own.name}") if file.stat().st_mtime > began]
    taken = {inode for file in later for inode in json.loads(file.read_text())}
    return frozenset(json.loads(own.read_text())) - taken


@dataclass(frozen=True)
class Traces:
    """What to look for; gathered before `down`, since it lies in the state that `down` removes."""

    cluster: Cluster
    interface: str | None
    namespaces: frozenset[str]
    # In clock ticks since the machine started, as in /proc/<pid>/stat.
    gathered: float

    @staticmethod
    def of(cluster: Cluster) -> Traces:
        interface = cluster.plan.interface if cluster.plan_file.exists() else None
        ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        return Traces(cluster, interface, own_namespaces(cluster), ticks)

    def left(self) -> list[str]:
        """Sentences about what is left, after the moment that the kernel needs to clean up."""
        wait_until(lambda: not self._left(), 10, pause=0.1)
        return self._left()

    def _left(self) -> list[str]:
        found = [f"the process {pid} runs in its namespaces" for pid in self._inhabitants()]
        if self.interface is not None and Path("/sys/class/net", self.interface).exists():
            found.append(f"the interface {self.interface} exists")
        found += [f"the cgroup {folder} exists" for folder in cgroups.left(self.cluster.cgroup)]
        found += [f"{point} is mounted" for point in mounts_below(self.cluster.state)]
        if self.cluster.state.exists():
            found.append(f"the folder {self.cluster.state} exists")
        return found

    def _inhabitants(self) -> list[int]:
        """Processes in its namespaces. (The kernel reuses their numbers: a process that began later is another's.)"""
        found = []
        for pid in all_pids():
            process = Process.of(pid)
            if process is None or int(process.started) > self.gathered:
                continue
            for kind in NAMESPACES:
                try:
                    inode = os.readlink(f"/proc/{pid}/ns/{kind}")
                except OSError:
                    continue
                if inode in self.namespaces:
                    found.append(pid)
                    break
        return found

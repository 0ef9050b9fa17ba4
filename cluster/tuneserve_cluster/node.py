"""The namespaces that a cluster runs in: mounts, network, processes, host name, IPC of its own.

One holder process is PID 1 of them. Every component is an ordinary process
entered into them; killing the holder makes the kernel end them all and take
mounts, network and firewall rules along. The machine's own stay as they were.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tuneserve_cluster import cgroups
from tuneserve_cluster.addresses import AddressPlan, free_index, parse_routes
from tuneserve_cluster.errors import ClusterError, run
from tuneserve_cluster.packages import program
from tuneserve_cluster.process import Process, child_running, detach, with_word
from tuneserve_cluster.settings import Cluster

NAMESPACES = ("mnt", "net", "pid", "uts", "ipc")
NODE_INTERFACE = "node0"
# The kubelet writes these for the whole machine: in its namespace they are files of its own.
SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
# Folders that the kubelet and the CNI plug-ins write to whatever they are told: in the node they are empty and private.
PRIVATE_FOLDERS = ("/var/lib", "/var/log")


def choose_plan(cluster: Cluster) -> AddressPlan:
    """The addresses of this cluster: those of its earlier `up`, or the first block that is free."""
    if cluster.plan_file.exists():
        return cluster.plan
    taken = {int(json.loads(file.read_text())["index"]) for file in (cluster.cache / "clusters").glob("*/plan.json")}
    routes = parse_routes(
        run([program("ip"), "-4", "route", "show", "table", "all"], "cannot read the machine's routes")
    )
    index = free_index(taken, routes)
    if index is None:
        raise ClusterError(
            "no block of addresses is free in 10.200.0.0-10.203.255.255; end another cluster with `cluster down`"
        )
    cluster.plan_file.parent.mkdir(parents=True, exist_ok=True)
    cluster.plan_file.write_text(json.dumps({"index": index}))
    return AddressPlan(index)


class Node:
    """One cluster's namespaces."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.pid_file = cluster.pids / "holder"

    def holder(self) -> Process | None:
        return Process.read(self.pid_file)

    def enter(self, command: Sequence[str | Path]) -> list[str | Path]:
        """The command line that runs a command inside. (-p makes nsenter fork: the command is its child.)"""
        holder = self.holder()
        if holder is None:
            raise ClusterError(f"the cluster {self.cluster.name!r} is not up; run `cluster up`")
        return [program("nsenter"), "-t", str(holder.pid), "-m", "-n", "-p", "-u", "-i", "--", *command]

    def start(self) -> bool:
        """Makes the namespaces unless they are there; whether they are new."""
        if self.holder() is not None:
            return False
        shutil.rmtree(self.cluster.pids, ignore_errors=True)
        remove_interface(self.cluster.plan)
        pause = self.cluster.bin / "pause"
        for stray in with_word(f"{pause} {self.cluster.state} "):
            stray.kill()  # of an interrupted `up`, which did not write it down
        flags = ["--mount", "--net", "--pid", "--uts", "--ipc", "--fork", "--propagation", "private", "--mount-proc"]
        log = self.cluster.logs / "holder.log"
        # The state folder, an argument that pause ignores, lets a holder be found whose pid file is lost.
        started = detach([program("unshare"), *flags, pause, self.cluster.state], log)
        holder = _holder_running(started, pause)
        if holder is None:
            raise ClusterError("cannot make namespaces: this needs root with CAP_SYS_ADMIN", log)
        holder.write(self.pid_file)
        try:
            self._write_namespaces(holder)
            self._connect(holder)
            run(self.enter(["/bin/sh", "-ec", self._setup_script()]), "cannot set the node's namespaces up")
            self._add_routes()
        except ClusterError:
            holder.kill()  # half a node is worse than none: the next `up` would take it for a whole one
            raise
        return True

    def _write_namespaces(self, holder: Process) -> None:
        """Their inode numbers, by which `down` checks that nothing lives in them any more."""
        inodes = [Path(f"/proc/{holder.pid}/ns/{kind}").readlink().name for kind in NAMESPACES]
        self.cluster.namespaces_file.write_text(json.dumps(inodes))

    def _connect(self, holder: Process) -> None:
        plan, ip = self.cluster.plan, program("ip")
        failure = f"cannot make the interface {plan.interface}"
        peer = ["peer", "name", NODE_INTERFACE, "netns", str(holder.pid)]
        run([ip, "link", "add", plan.interface, "type", "veth", *peer], failure)
        run([ip, "address", "add", f"{plan.host_ip}/24", "dev", plan.interface], failure)
        run([ip, "link", "set", plan.interface, "up"], failure)

    def _add_routes(self) -> None:
        """So that the machine reaches pods and ClusterIPs; they vanish with the interface."""
        plan = self.cluster.plan
        for network in (plan.pods, plan.services):
            run(
                [program("ip"), "route", "replace", str(network), "via", plan.node_ip],
                f"cannot add a route to {network}",
            )

    def _setup_script(self) -> str:
        cluster, plan, ip = self.cluster, self.cluster.plan, program("ip")
        cache, kubelet = shlex.quote(str(cluster.cache)), shlex.quote(str(cluster.state / "kubelet"))
        lines = [
            f"hostname {cluster.node_name}",
            "mount -t tmpfs tmpfs /run",
            "mkdir -p /run/lock /run/cache",
            f"mount --rbind {cache} /run/cache",
            *(f"mount -t tmpfs tmpfs {folder}" for folder in PRIVATE_FOLDERS),
            # The cache may lie in a folder that is hidden now.
            f"mkdir -p {cache} && mount --rbind /run/cache {cache} && umount -l /run/cache",
            # The device plug-in folder is fixed there, whatever --root-dir says.
            f"mkdir -p {kubelet} /var/lib/kubelet && mount --bind {kubelet} /var/lib/kubelet",
            f"{ip} link set lo up",
            f"{ip} address add {plan.node_ip}/24 dev {NODE_INTERFACE}",
            f"{ip} link set {NODE_INTERFACE} up",
            # ClusterIPs need some route; those that no rule serves end at the wire.
            f"{ip} route add {plan.services} dev {NODE_INTERFACE}",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            # There only when the bridge module is loaded.
            "bridged=/proc/sys/net/bridge/bridge-nf-call-iptables",
            "if [ -e $bridged ]; then echo 1 > $bridged; fi",
            "mkdir -p /run/sysctl",
        ]
        for name, value in SYSCTLS.items():
            private = f"/run/sysctl/{name.replace('/', '_')}"
            bind = f"echo {value} > {private}; mount --bind {private} /proc/sys/{name}"
            lines.append(f"if [ -e /proc/sys/{name} ]; then {bind}; fi")
        lines.append("mount --make-rshared /")  # volumes are propagated from the kubelet into containers
        return "\n".join(lines)

    def stop(self) -> None:
        """Ends everything inside, and what was left behind by a run whose pid file is lost."""
        holder = self.holder()
        if holder is not None:
            holder.kill()
        remove_interface(self.cluster.plan if self.cluster.plan_file.exists() else None)
        cgroups.remove(self.cluster.cgroup)


def _holder_running(started: subprocess.Popen[bytes], pause: Path) -> Process | None:
    """The holder, once it has become `pause`: until then, mounts of its namespace are not in place."""
    wanted = pause.resolve()
    for _ in range(500):
        process = child_running(started)
        if process is None:
            return None
        try:
            if Path(f"/proc/{process.pid}/exe").readlink() == wanted:
                return process
        except OSError:
            pass
    return None


def remove_interface(plan: AddressPlan | None) -> None:
    """The kernel removes it with the namespace, a moment later than one can wait for."""
    if plan is not None and Path("/sys/class/net", plan.interface).exists():
        subprocess.run([program("ip"), "link", "delete", plan.interface], capture_output=True, check=False)

"""up, down and status: the order in which a cluster comes, goes, and is looked at."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuneserve_cluster import build, cgroups, components, configuration, kwok, leftovers, pki
from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.kubectl import Kubectl, is_ready
from tuneserve_cluster.node import Node, choose_plan
from tuneserve_cluster.process import raise_file_limit, with_word
from tuneserve_cluster.settings import MANIFESTS, Cluster
from tuneserve_cluster.store import ImageStore
from tuneserve_cluster.supervisor import Supervisor


@dataclass(frozen=True)
class Wishes:
    """The options of `up`."""

    control_plane_only: bool = False
    fake_nodes: int | None = None
    fake_gpus: int = 1
    hold_fake_jobs: bool = False
    gpus: int | None = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One `up` or `down` at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Lifecycle:
    """One cluster, from nothing to Ready and back."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.node = Node(cluster)
        self.supervisor = Supervisor(cluster, self.node)
        self.store = ImageStore(cluster, self.node)
        self.kubectl = Kubectl(cluster)

    def up(self, wishes: Wishes) -> None:
        """Idempotent: what runs is left alone, what died is started again."""
        if os.geteuid() != 0:
            raise ClusterError("run it as root: it makes namespaces, interfaces and cgroups")
        begun = time.monotonic()
        with locked(self.cluster.lock):
            self._choose_binaries()
            with locked(self.cluster.cache / "clusters" / ".plan.lock"):
                choose_plan(self.cluster)
            raise_file_limit()
            pki.create(self.cluster, build.kubernetes_version())
            self.node.start()
            if not wishes.control_plane_only:
                self.supervisor.start(components.containerd(self.cluster))
            self._start_control_plane(wishes)
            if not wishes.control_plane_only:
                self._start_node()
            self._start_extras(wishes)
        what = "control plane" if wishes.control_plane_only else "node"
        print(f"the {what} of {self.cluster.name!r} is ready after {time.monotonic() - begun:.1f} s")
        print(f"export KUBECONFIG={self.cluster.kubeconfig}")

    def _choose_binaries(self) -> None:
        """The newest, unless the cluster runs: then those that it was started with."""
        if self.node.holder() is not None and self.cluster.bin.exists():
            return
        binaries = build.built(self.cluster.cache)
        if binaries is None:
            raise ClusterError("the binaries are not built yet; run `cluster build` (about 8 minutes, once)")
        self.cluster.state.mkdir(parents=True, exist_ok=True)
        self.cluster.state.chmod(0o711)  # keys lie below; containers must pass through to their volumes
        self.cluster.bin.unlink(missing_ok=True)
        self.cluster.bin.symlink_to(binaries)

    def _start_control_plane(self, wishes: Wishes) -> None:
        self.supervisor.start(components.etcd(self.cluster))
        self.supervisor.start(components.apiserver(self.cluster))
        self.supervisor.wait("kube-apiserver", self.supervisor.api_ready, 90, "the API server was not ready")
        self.supervisor.start(components.controller_manager(self.cluster))
        self.supervisor.start(components.scheduler(self.cluster))
        stages = self.cluster.conf / "kwok-stages.yaml"
        before = stages.read_text() if stages.exists() else None
        kwok.write_stages(self.cluster, wishes.hold_fake_jobs)
        if stages.read_text() != before:
            self.supervisor.stop("kwok")  # it reads them once
        self.supervisor.start(components.kwok(self.cluster, stages))

    def _start_node(self) -> None:
        cluster, supervisor = self.cluster, self.supervisor
        supervisor.wait("containerd", self.store.answers, 30, "containerd did not answer")
        if supervisor.process("kubelet") is None and self.store.stale_containers():
            supervisor.stop("containerd")
            supervisor.start(components.containerd(cluster))
            supervisor.wait("containerd", self.store.answers, 30, "containerd did not answer")
        self.store.load_system_images()
        cgroups.create(cluster.cgroup)
        since = 0.0 if supervisor.process("kubelet") else time.time()
        supervisor.start(components.kubelet(cluster))
        supervisor.start(components.kube_proxy(cluster))
        manifests = sorted((MANIFESTS / "cluster").glob("*.yaml"))
        self.kubectl.apply("\n---\n".join(configuration.render(path, cluster) for path in manifests))
        supervisor.start(components.local_path_provisioner(cluster))
        supervisor.wait(
            "kubelet", lambda: self.kubectl.node_ready(cluster.node_name, since), 60, "the node was not Ready"
        )

    def _start_extras(self, wishes: Wishes) -> None:
        # The controller-manager makes it a moment later; until then every pod is Forbidden.
        self.kubectl.call("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        if wishes.gpus is not None and not wishes.control_plane_only:
            kwok.set_real_gpus(self.kubectl, self.cluster.node_name, wishes.gpus)
        if wishes.fake_nodes is not None:
            kwok.set_fake_nodes(self.kubectl, wishes.fake_nodes, wishes.fake_gpus)

    def down(self, purge: bool = False) -> None:
        """Ends everything and removes all state but the images; says so if anything is left."""
        if os.geteuid() != 0:
            raise ClusterError("run it as root, as `up` was")
        cluster = self.cluster
        with locked(cluster.lock):
            traces = leftovers.Traces.of(cluster)
            self.node.stop()
            for process in with_word(f"{cluster.state}/") + with_word(f"{cluster.state} "):
                # Whatever a killed `up` or a lost pid file left: every component names a file of the state folder.
                if leftovers.is_component(process, cluster):
                    process.kill()
            leftovers.assert_unmounted(cluster)
            shutil.rmtree(cluster.state, ignore_errors=True)
            for part in ("io.containerd.grpc.v1.cri", "io.containerd.sandbox.controller.v1.shim"):
                shutil.rmtree(cluster.image_store / part, ignore_errors=True)
            if purge:
                shutil.rmtree(cluster.image_store, ignore_errors=True)
            left = traces.left()
            if left:
                raise ClusterError("down left something behind:\n" + "\n".join(f"  {each}" for each in left))
        print(
            f"the cluster {cluster.name!r} is gone"
            + ("" if purge else "; its images are kept (remove them with `down --purge`)")
        )

    def status(self) -> bool:
        """Prints a table; whether everything that was started lives and the API and the nodes are ready."""
        cluster = self.cluster
        holder = self.node.holder()
        if holder is None:
            print(f"the cluster {cluster.name!r} is not up; run `cluster up`")
            return False
        good = True
        print(f"{'component':24} {'pid':>8} {'alive':6} {'MiB':>6}")
        for name in ("holder", *components.CONTROL_PLANE, *components.NODE):
            if not (cluster.pids / name).exists():
                continue
            process = self.supervisor.process(name)
            good &= process is not None
            pid, memory = (str(process.pid), f"{process.memory_mib():.0f}") if process else ("-", "-")
            print(f"{name:24} {pid:>8} {'yes' if process else 'NO':6} {memory:>6}")
        if not self.supervisor.api_ready():
            where = f"{cluster.plan.node_ip}:6443"
            print(f"the API server at {where} is not ready; its log is {self.supervisor.log('kube-apiserver')}")
            return False
        nodes = self.kubectl.get("nodes")["items"]
        ready = {node["metadata"]["name"]: is_ready(node) for node in nodes}
        fake = [name for name in ready if name != cluster.node_name]
        if cluster.node_name in ready:
            print(f"node {cluster.node_name}: {'Ready' if ready[cluster.node_name] else 'NOT Ready'}")
        if fake:
            print(f"fake nodes: {sum(ready[name] for name in fake)} of {len(fake)} Ready")
        return good and all(ready.values())

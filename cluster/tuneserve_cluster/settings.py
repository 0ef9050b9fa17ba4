"""Where everything lies, and under which name: read once, passed to every other module.

All state is in one cache folder outside the repository:

    bin/<hash>/        binaries and system images, built from the sources with this hash
    clusters/<name>/   one cluster: etcd, certificates, logs, volumes; `down` removes it
    stores/<name>/     containerd's image store, kept by `down` so that the next `up` has the images at once
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tuneserve_cluster.addresses import AddressPlan
from tuneserve_cluster.errors import ClusterError

DEFAULT_NAME = "tuneserve"
HERE = Path(__file__).resolve().parent.parent
GO_SOURCES = HERE / "go"
MANIFESTS = HERE / "manifests"
SYSTEM_REGISTRY = "cluster.tuneserve.dev"
PAUSE_IMAGE = f"{SYSTEM_REGISTRY}/pause:1"
BUSYBOX_IMAGE = f"{SYSTEM_REGISTRY}/busybox:1"
COREDNS_IMAGE = f"{SYSTEM_REGISTRY}/coredns:1"
# A unix socket's path is at most 107 bytes long, and containerd's lies in the state folder.
LONGEST_SOCKET = 107


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder for all that is built and run; override with TUNESERVE_CACHE."""
    if own := environment.get("TUNESERVE_CACHE"):
        return Path(own).expanduser().resolve()
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().resolve() / "tuneserve"


def is_external(environment: Mapping[str, str] = os.environ) -> bool:
    """CLUSTER=external: the user brings a cluster, named by KUBECONFIG."""
    return environment.get("CLUSTER") == "external"


@dataclass(frozen=True)
class Cluster:
    """One cluster's names and paths. Its index (hence addresses) is chosen by the first `up`."""

    name: str
    cache: Path

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?", self.name):
            raise ClusterError(f"{self.name!r} is no cluster name: use at most 30 of a-z, 0-9 and '-'")
        if Path("/run") in self.cache.parents or Path("/proc") in self.cache.parents:
            raise ClusterError(f"{self.cache} cannot be the cache: the node hides /run; set TUNESERVE_CACHE to a disk")
        if len(str(self.containerd_socket)) > LONGEST_SOCKET:
            raise ClusterError(f"{self.cache} is too long a path for a socket; set TUNESERVE_CACHE to a shorter one")

    @property
    def state(self) -> Path:
        return self.cache / "clusters" / self.name

    @property
    def image_store(self) -> Path:
        return self.cache / "stores" / self.name

    @property
    def lock(self) -> Path:
        return self.cache / "clusters" / f".{self.name}.lock"

    @property
    def bin(self) -> Path:
        """A link to the binaries it was started with: a later `build` changes nothing under a running cluster."""
        return self.state / "bin"

    @property
    def namespaces_file(self) -> Path:
        """The namespaces that the running cluster has, as /proc names them (a JSON list)."""
        return self.state / "namespaces.json"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def conf(self) -> Path:
        return self.state / "conf"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def pids(self) -> Path:
        return self.state / "pid"

    @property
    def volumes(self) -> Path:
        return self.state / "volumes"

    @property
    def containerd_socket(self) -> Path:
        return self.state / "containerd.sock"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    @property
    def node_name(self) -> str:
        return f"{self.name}-node"

    @property
    def cgroup(self) -> str:
        return f"tuneserve-{self.name}"

    @property
    def plan_file(self) -> Path:
        return self.state / "plan.json"

    @property
    def plan(self) -> AddressPlan:
        """The addresses that the first `up` chose."""
        try:
            return AddressPlan(int(json.loads(self.plan_file.read_text())["index"]))
        except FileNotFoundError:
            raise ClusterError(f"the cluster {self.name!r} is not up; run `cluster up`") from None

    @property
    def environment(self) -> dict[str, str]:
        """What kubectl and helm need to speak to it."""
        return {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": f"{self.bin}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        }


def write_if_changed(path: Path, text: str) -> None:
    """Kept as it is when the same: kube-proxy exits whenever its configuration file is rewritten."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.rename(path)

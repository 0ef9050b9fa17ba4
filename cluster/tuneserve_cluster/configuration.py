"""The configuration files of the components, from the templates under manifests/node/."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template

from tuneserve_cluster import cgroups
from tuneserve_cluster.packages import CNI_PLUGINS, program
from tuneserve_cluster.settings import BUSYBOX_IMAGE, COREDNS_IMAGE, MANIFESTS, PAUSE_IMAGE, Cluster, write_if_changed


def render(template: Path, cluster: Cluster) -> str:
    """A template with this cluster's values; an unknown name in it is an error, not an empty string."""
    plan = cluster.plan
    return Template(template.read_text()).substitute(
        state=cluster.state,
        image_store=cluster.image_store,
        conf=cluster.conf,
        pki=cluster.pki,
        volumes=cluster.volumes,
        socket=cluster.containerd_socket,
        kubeconfig=cluster.kubeconfig,
        node=cluster.node_name,
        cgroup=cluster.cgroup,
        fail_cgroup_v1=json.dumps(cgroups.is_v2()),
        pods=plan.pods,
        node_ip=plan.node_ip,
        dns_ip=plan.dns_ip,
        runc=program("runc"),
        cni_plugins=CNI_PLUGINS,
        pause_image=PAUSE_IMAGE,
        coredns_image=COREDNS_IMAGE,
        busybox_image=BUSYBOX_IMAGE,
    )


def _write(cluster: Cluster, template: str, target: Path) -> Path:
    write_if_changed(target, render(MANIFESTS / "node" / template, cluster))
    return target


def write_containerd(cluster: Cluster) -> Path:
    return _write(cluster, "containerd.toml", cluster.conf / "containerd.toml")


def write_cni(cluster: Cluster) -> Path:
    return _write(cluster, "cni.conflist", cluster.conf / "cni" / "10-pods.conflist")


def write_kubelet(cluster: Cluster) -> Path:
    write_if_changed(cluster.conf / "resolv.conf", "# the node reaches no name server outside\n")
    return _write(cluster, "kubelet.yaml", cluster.conf / "kubelet.yaml")


def write_kube_proxy(cluster: Cluster) -> Path:
    return _write(cluster, "kube-proxy.yaml", cluster.conf / "kube-proxy.yaml")


def write_local_path(cluster: Cluster) -> tuple[Path, Path]:
    cluster.volumes.mkdir(parents=True, exist_ok=True)
    config = _write(cluster, "local-path.json", cluster.conf / "local-path.json")
    return config, _write(cluster, "local-path-helper.yaml", cluster.conf / "local-path-helper.yaml")

"""Fake nodes with fake GPUs, kept alive by KWOK: scheduling at scale, and Jobs without containers."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.kubectl import Kubectl, is_ready
from tuneserve_cluster.process import wait_until
from tuneserve_cluster.settings import MANIFESTS, Cluster, write_if_changed

GPU_PRODUCT = "NVIDIA-GeForce-RTX-4090"
GPU_MEMORY_MIB = 24564
FAKE = "kwok.x-k8s.io/node"


def gpu_labels(gpus: int) -> dict[str, str]:
    """What NVIDIA's feature discovery would say of these GPUs."""
    return {
        "nvidia.com/gpu.product": GPU_PRODUCT,
        "nvidia.com/gpu.count": str(gpus),
        "nvidia.com/gpu.memory": str(GPU_MEMORY_MIB),
        "nvidia.com/gpu.compute.major": "8",
        "nvidia.com/gpu.compute.minor": "9",
    }


def write_stages(cluster: Cluster, hold_jobs: bool) -> Path:
    """KWOK's stages for nodes and ours for pods. With `hold_jobs` no pod of a Job ends by itself."""
    ours = Template((MANIFESTS / "kwok" / "pods.yaml").read_text())
    stages = (cluster.bin / "kwok-stages.yaml").read_text()
    path = cluster.conf / "kwok-stages.yaml"
    write_if_changed(path, f"{stages}\n---\n{ours.substitute(completed_owner='None' if hold_jobs else 'Job')}")
    return path


def fake_node(index: int, gpus: int) -> dict[str, Any]:
    """A node object. It must not have `status.nodeInfo`: KWOK would then never fill it in."""
    name = f"fake-{index:03d}"
    resources = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "1Ti"}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    labels = {
        "type": "kwok",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        **(gpu_labels(gpus) if gpus else {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": labels,
            "annotations": {FAKE: "fake", "node.alpha.kubernetes.io/ttl": "0"},
        },
        "spec": {"taints": [{"key": FAKE, "value": "fake", "effect": "NoSchedule"}]},
        "status": {"allocatable": resources, "capacity": resources},
    }


def _names(kubectl: Kubectl) -> list[str]:
    return [node["metadata"]["name"] for node in kubectl.get("nodes", "-l", "type=kwok")["items"]]


def set_fake_nodes(kubectl: Kubectl, count: int, gpus: int) -> None:
    """Brings the number of fake nodes to `count`; those that differ are made anew."""
    wanted = {f"fake-{index:03d}": fake_node(index, gpus) for index in range(count)}
    present = {item["metadata"]["name"]: item for item in kubectl.get("nodes", "-l", "type=kwok")["items"]}

    def gpus_of(node: dict[str, Any]) -> str:
        return str(node["status"].get("capacity", {}).get("nvidia.com/gpu", "0"))

    wrong = [name for name, node in present.items() if name not in wanted or gpus_of(node) != str(gpus)]
    if wrong:
        kubectl.call("delete", "node", "--wait=false", *wrong)
        if not wait_until(lambda: not any(each in wrong for each in _names(kubectl)), 60, pause=0.2):
            raise ClusterError("the fake nodes were not deleted within 60 s", kubectl.cluster.logs / "kwok.log")
    fresh = [node for name, node in wanted.items() if name not in present or name in wrong]
    if fresh:
        kubectl.call(
            "create",
            "--validate=false",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": fresh}),
        )

    def all_ready() -> bool:
        # Not `kubectl wait`: it watches one node after the other, 0.1 s each.
        return sum(is_ready(node) for node in kubectl.get("nodes", "-l", "type=kwok")["items"]) == count

    if not wait_until(all_ready, 60, pause=0.2):
        raise ClusterError("the fake nodes were not Ready within 60 s", kubectl.cluster.logs / "kwok.log")


def set_real_gpus(kubectl: Kubectl, node: str, gpus: int) -> None:
    """Pretends that the real node has GPUs: pods that ask for one are scheduled and run, without a device."""
    amount = {"nvidia.com/gpu": str(gpus)}
    status = json.dumps({"status": {"capacity": amount, "allocatable": amount}})
    kubectl.call("patch", "node", node, "--subresource=status", "--type=merge", "-p", status)
    kubectl.call("label", "node", node, "--overwrite", *(f"{key}={value}" for key, value in gpu_labels(gpus).items()))

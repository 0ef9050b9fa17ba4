"""Specs and configuration for tests that run the operator's code in the test process."""

from typing import Any

from tuneserve.config import OperatorConfig, parse_config

Object = dict[str, Any]

CONFIG = """
profiles:
- name: cpu
  default: true
  device: cpu
  images: {trainer: "trainer:1", server: "server:1"}
- name: rtx-4090
  device: cuda
  memory: 24Gi
  nodeSelector: {nvidia.com/gpu.product: NVIDIA-GeForce-RTX-4090}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  runtimeClassName: nvidia
  images: {trainer: "trainer:1", server: "server:1"}
- name: reserved
  device: cpu
  namespaces: [research]
  images: {trainer: "trainer:1", server: "server:1"}
"""


def config(text: str = CONFIG) -> OperatorConfig:
    return parse_config(text)


def claim(name: str, **status: Any) -> Object:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
    return {**body, "status": {"phase": "Bound", **status}}


def spec(**fields: Any) -> Object:
    """A classification with everything on claims; `fields` replace or add top-level fields."""
    return {
        "baseModel": {"claim": {"name": "base", "path": "model"}},
        "dataset": {"train": [{"claim": {"name": "data", "path": "train.jsonl"}}]},
        "task": {"classification": {"labels": ["good", "bad"]}},
        **fields,
    }


def finetune(name: str = "demo", *, annotations: dict[str, str] | None = None, **fields: Any) -> Object:
    metadata = {"name": name, "namespace": "team", "annotations": annotations or {}}
    return {
        "apiVersion": "tuneserve.dev/v1alpha1",
        "kind": "FineTune",
        "metadata": metadata,
        "spec": spec(**fields),
    }

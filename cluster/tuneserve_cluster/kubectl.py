"""The few things that `up` and `status` ask of the API, through kubectl."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from tuneserve_cluster.errors import run
from tuneserve_cluster.settings import Cluster

Command = list[str | Path]


class Kubectl:
    """kubectl with the cluster's own kubeconfig."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.program = cluster.bin / "kubectl"

    def apply(self, manifests: str) -> None:
        command: Command = [self.program, "apply", "--server-side", "--force-conflicts", "-f", "-"]
        run(command, "the cluster's own manifests are refused", env=self.cluster.environment, stdin=manifests)

    def get(self, *arguments: str) -> Any:
        command: Command = [self.program, "get", *arguments, "-o", "json", "--request-timeout=5s"]
        return json.loads(run(command, f"cannot get {' '.join(arguments)}", env=self.cluster.environment))

    def call(self, *arguments: str, stdin: str | None = None) -> str:
        return run(
            [self.program, *arguments], f"kubectl {arguments[0]} failed", env=self.cluster.environment, stdin=stdin
        )

    def node_ready(self, name: str, since: float = 0.0) -> bool:
        """Whether the kubelet has called the node Ready after this time (etcd may remember an earlier life of it)."""
        condition = '.status.conditions[?(@.type=="Ready")]'
        path = f"{{{condition}.status}} {{{condition}.lastHeartbeatTime}}"
        command: Command = [self.program, "get", "node", name, "-o", f"jsonpath={path}", "--request-timeout=2s"]
        done = subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, check=False)
        status, _, heartbeat = done.stdout.strip().partition(" ")
        # Heartbeats are written in whole seconds.
        return status == "True" and datetime.fromisoformat(heartbeat).timestamp() >= int(since)


def is_ready(node: dict[str, Any]) -> bool:
    """Whether a node object says that it is Ready."""
    conditions = node["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)

"""Starts components inside the node, and knows which of them live."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tuneserve_cluster.components import Component
from tuneserve_cluster.errors import ClusterError
from tuneserve_cluster.node import Node
from tuneserve_cluster.process import Process, child_running, detach, in_namespace_of, wait_until
from tuneserve_cluster.settings import Cluster


class Supervisor:
    """The processes of one cluster, by name."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self.cluster = cluster
        self.node = node

    def process(self, name: str) -> Process | None:
        return Process.read(self.cluster.pids / name)

    def log(self, name: str) -> Path:
        return self.cluster.logs / f"{name}.log"

    def start(self, component: Component) -> None:
        """Starts it unless it lives."""
        if self.process(component.name) is not None:
            return
        program = self.cluster.bin / component.name
        holder = self.node.holder()
        # One that an interrupted `up` started and did not write down would hold the port of the new one.
        for stray in [] if holder is None else in_namespace_of(holder, program.resolve()):
            stray.kill()
        command = self.node.enter([program, *component.arguments])
        started = detach(command, self.log(component.name), env=self.cluster.environment)
        process = child_running(started)
        if process is None:
            raise ClusterError(f"{component.name} ended at once", self.log(component.name))
        process.write(self.cluster.pids / component.name)

    def stop(self, name: str) -> None:
        process = self.process(name)
        if process is not None:
            process.kill()
        (self.cluster.pids / name).unlink(missing_ok=True)

    def wait(self, name: str, ready: Callable[[], bool], timeout: float, what: str) -> None:
        """Waits for a condition that a component brings about; its death ends the wait."""

        def settled() -> bool:
            return ready() or self.process(name) is None

        if not wait_until(settled, timeout, pause=0.1):
            raise ClusterError(f"{what} within {timeout:.0f} s; the log of {name} may say why", self.log(name))
        if self.process(name) is None:
            raise ClusterError(
                f"{name} ended; it starts again with `cluster up`, once the cause is gone", self.log(name)
            )

    def api_ready(self) -> bool:
        """Whether the API server says that all its start-up hooks are done (among them the default roles)."""
        trust = ssl.create_default_context(cafile=str(self.cluster.pki / "ca.crt"))
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        )
        try:
            with direct.open(f"https://{self.cluster.plan.node_ip}:6443/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

"""A real API server (with etcd and the controllers, without a node) that has the CRDs of this checkout."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.server import Server, proxied
from support.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "api"
NAMESPACE = "api-tests"


def cluster(*arguments: str) -> None:
    """Runs the cluster tool; its own words are the reason when it fails."""
    done = subprocess.run([ROOT / "cluster/cluster", *arguments], capture_output=True, text=True, timeout=280)
    if done.returncode:
        pytest.fail(f"cluster {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.fixture(scope="session")
def kubectl() -> Iterator[Kubectl]:
    """A namespace of a cluster in which both kinds are established."""
    cluster("up", "--name", CLUSTER, "--control-plane")
    kubectl = Kubectl(command=(str(ROOT / "cluster/cluster"), "kubectl", "--name", CLUSTER), namespace=NAMESPACE)
    kubectl.run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kubectl.run("wait", "--for=condition=Established", "--timeout=60s", "-f", str(ROOT / "crds"))
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    yield kubectl
    kubectl.run("delete", "namespace", NAMESPACE)
    cluster("down", "--name", CLUSTER)


@pytest.fixture(scope="session")
def server(kubectl: Kubectl) -> Iterator[Server]:
    with proxied(kubectl) as server:
        yield server

"""A real API server with controllers and without a node, and helm for it."""

from collections.abc import Iterator

import pytest

from chart.release import CLUSTER, NAMESPACE, ROOT, Helm, cluster
from support.kubectl import Kubectl


@pytest.fixture(scope="session")
def kubectl() -> Iterator[Kubectl]:
    """The namespace of the operator, which takes restricted pods only."""
    cluster("up", "--name", CLUSTER, "--control-plane", "--fake-nodes", "1")
    kubectl = Kubectl(command=(str(ROOT / "cluster/cluster"), "kubectl", "--name", CLUSTER), namespace=NAMESPACE)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    yield kubectl
    cluster("down", "--name", CLUSTER)


@pytest.fixture(scope="session")
def helm(kubectl: Kubectl) -> Helm:
    return Helm(command=(str(ROOT / "cluster/cluster"), "helm", "--name", CLUSTER))

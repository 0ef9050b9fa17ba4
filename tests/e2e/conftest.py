"""The real one-node cluster, with the operator installed by helm as a user installs it.

Pods run from the real images; nothing of the operator or the pipeline is imported here.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.data import write_data
from support.installation import NAMESPACE, OURS, ROOT, SYSTEM
from support.kubectl import Kubectl
from support.tiny import reviews, write_jsonl, write_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def installed() -> None:
    """The cluster is up and TuneServe is installed from this checkout's images and chart."""
    subprocess.run([sys.executable, "demo/demo.py", "--install-only"], cwd=ROOT, check=True)


@pytest.fixture(scope="session")
def cluster_command() -> tuple[str, ...]:
    if os.environ.get("CLUSTER") == "external":
        return ("kubectl",)
    return (str(ROOT / "cluster/cluster"), "kubectl")


@pytest.fixture(scope="session")
def system(installed: None, cluster_command: tuple[str, ...]) -> Kubectl:
    """The operator's namespace."""
    return Kubectl(command=cluster_command, namespace=SYSTEM, pause=2)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model and small data files, on this machine."""
    model = tmp_path_factory.mktemp("tiny")
    write_tiny_model(model / "model")
    data = tmp_path_factory.mktemp("data")
    write_data(data)
    # What examples/sentiment/fetch.py makes, but small: the examples themselves are applied as they are.
    base = tmp_path_factory.mktemp("smollm2")
    write_tiny_model(base)
    tweets = tmp_path_factory.mktemp("tweets")
    write_jsonl(tweets / "tweets.jsonl", reviews(300))
    return {"tiny": model, "data": data, "smollm2": base, "tweets": tweets}


@pytest.fixture(scope="session")
def loaded(installed: None, cluster_command: tuple[str, ...], material: dict[str, Path]) -> Iterator[Kubectl]:
    """A namespace that enforces the restricted pod security standard, with the claims `tiny` and `data`."""
    kubectl = Kubectl(command=cluster_command, namespace=NAMESPACE, pause=2)
    kubectl.run("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=180)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    for claim, directory in material.items():
        load = [str(ROOT / "examples/load"), "--namespace", NAMESPACE, "--claim", claim, str(directory)]
        subprocess.run(load, cwd=ROOT, check=True)
    yield kubectl
    kubectl.run("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=180)


@pytest.fixture
def kubectl(loaded: Kubectl) -> Iterator[Kubectl]:
    """The loaded namespace; afterwards no FineTune, ModelServe or artifacts claim is left in it."""
    yield loaded
    for kind in ("modelserve", "finetune"):
        loaded.run("delete", kind, "--all", "--wait=true")
    loaded.wait_gone("pods", selector=OURS, timeout=240)
    loaded.run("delete", "persistentvolumeclaims", "-l", OURS, "--wait=false")

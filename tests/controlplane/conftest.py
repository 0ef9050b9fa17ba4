"""The real operator on a real API server with real controllers; KWOK plays the nodes, so that no container runs.

Pods of Jobs end as the annotations `fake.tuneserve.dev/…` say (`hold`, `exit-code`, `message`), set on the pod.
"""

import fcntl
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.kubectl import Kubectl, Object
from support.operators import OperatorProcess

ROOT = Path(__file__).resolve().parents[2]
#: Another name lets two runs go on beside each other.
CLUSTER = os.environ.get("TUNESERVE_TEST_CLUSTER", "core")
NAMESPACE = "tuneserve-system"
#: Short, so that a test of a lost leader does not wait long.
LEASE = {"leaseSeconds": 5, "renewSeconds": 3, "retrySeconds": 1}
TOLERATIONS = [{"key": "kwok.x-k8s.io/node", "operator": "Exists", "effect": "NoSchedule"}]
CONFIG: dict[str, Any] = {
    "profiles": [
        {
            "name": "cpu",
            "default": True,
            "device": "cpu",
            "tolerations": TOLERATIONS,
            "images": {"trainer": "tuneserve/trainer:test", "server": "tuneserve/server:test"},
            "serverArgs": ["--dtype", "float32", "--enforce-eager"],
            "serverEnv": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"}],
        },
        {
            "name": "rtx-4090",
            "device": "cuda",
            "memory": "24Gi",
            "computeCapability": "8.9",
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090"},
            "tolerations": TOLERATIONS,
            "images": {"trainer": "tuneserve/trainer:test", "server": "vllm/vllm-openai:v0.33.0"},
        },
        {
            "name": "elsewhere",
            "device": "cpu",
            "nodeSelector": {"kubernetes.io/arch": "s390x"},
            "images": {"trainer": "tuneserve/trainer:test", "server": "tuneserve/server:test"},
        },
    ],
    "leaderElection": LEASE,
    "progressIntervalSeconds": 2,
}
_VOLUMES = 192


def cluster(*arguments: str) -> str:
    done = subprocess.run([ROOT / "cluster/cluster", *arguments], capture_output=True, text=True, timeout=280)
    if done.returncode:
        pytest.fail(f"cluster {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def _alone() -> Iterator[None]:
    """Two runs on one cluster would have two operators of one name, and the first to end would take it away."""
    with (Path(tempfile.gettempdir()) / f"tuneserve-{CLUSTER}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another run uses the cluster {CLUSTER}: set TUNESERVE_TEST_CLUSTER to another name"
            pytest.fail(message, pytrace=False)
        yield


@pytest.fixture(scope="session")
def admin(_alone: None) -> Iterator[Kubectl]:
    """kubectl for the namespace of the operator."""
    cluster("up", "--name", CLUSTER, "--control-plane", "--fake-nodes", "3", "--fake-gpus", "1", "--hold-fake-jobs")
    path = Path(cluster("kubeconfig", "--name", CLUSTER))
    # The binary itself: these tests call it hundreds of times.
    kubectl = Kubectl(command=(str(path.parent / "bin/kubectl"), "--kubeconfig", str(path)), namespace=NAMESPACE)
    kubectl.run("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    kubectl.run("wait", "--for=condition=Established", "--timeout=60s", "-f", str(ROOT / "crds"))
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}, *_storage())
    yield kubectl
    cluster("down", "--name", CLUSTER)


@pytest.fixture(scope="session")
def kubeconfig(admin: Kubectl) -> Path:
    return Path(cluster("kubeconfig", "--name", CLUSTER))


@pytest.fixture(scope="session")
def _session_operator(kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    operator = OperatorProcess(
        directory=tmp_path_factory.mktemp("operator"),
        kubeconfig=kubeconfig,
        config=CONFIG,
        lease_namespace=NAMESPACE,
        name="operator",
    )
    yield operator
    if operator.alive():
        operator.terminate()
        assert operator.wait() == 0, f"no clean end:\n{operator.tail()}"


@pytest.fixture
def operator(_session_operator: OperatorProcess) -> Iterator[OperatorProcess]:
    """The operator, running and leading whatever the test before did to it."""
    if not _session_operator.alive():
        _session_operator.start()
    _session_operator.wait_ready()
    yield _session_operator
    print(_session_operator.tail())  # shown when the test fails


@pytest.fixture
def no_operator(_session_operator: OperatorProcess) -> None:
    """Nothing that writes but the test; the next one that wants the operator starts it again."""
    if _session_operator.alive():
        _session_operator.terminate()
        assert _session_operator.wait() == 0


@pytest.fixture
def kubectl(admin: Kubectl) -> Iterator[Kubectl]:
    """kubectl for a namespace of the test's own."""
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    admin.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    yield Kubectl(command=admin.command, namespace=namespace)
    admin.run("delete", "namespace", namespace, "--wait=false")


def _storage() -> list[Object]:
    """A default class and volumes for it: without nodes there is no provisioner, but claims are bound all the same."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": "fake", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
    }
    volumes = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"fake-{index:03d}"},
            "spec": {
                "capacity": {"storage": "100Gi"},
                "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "storageClassName": "fake",
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": f"/fake/{index:03d}"},
            },
        }
        for index in range(_VOLUMES)
    ]
    return [storage_class, *volumes]

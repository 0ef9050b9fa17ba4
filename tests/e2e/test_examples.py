"""The examples, applied as they are: with a tiny model and data under the names that they use."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.hub import serve_hub
from support.installation import ROOT, STARTED, SYSTEM, TRAINED
from support.kubectl import Kubectl, Object, condition, is_true, stage
from support.tiny import write_tiny_model

EXAMPLES = ROOT / "examples"


def objects(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize(("example", "name"), [("sentiment", "sentiment"), ("instruction", "dates")])
def test_an_example_trains_and_serves(kubectl: Kubectl, example: str, name: str) -> None:
    kubectl.apply_file(str(EXAMPLES / example / "finetune.yaml"))
    kubectl.apply_file(str(EXAMPLES / example / "modelserve.yaml"))
    found = kubectl.wait("finetune", name, is_true("Ready"), timeout=TRAINED)
    assert [item["export"] for item in found["status"]["artifacts"]] == [
        item["name"] for item in found["spec"]["exports"]
    ]
    kubectl.wait("modelserve", name, is_true("Ready"), timeout=STARTED)


@pytest.fixture
def hub_of_the_example(
    kubectl: Kubectl, cluster_command: tuple[str, ...], tmp_path: Path
) -> Iterator[tuple[Object, list[str]]]:
    """The FineTune of examples/hub, and the requests of a hub with what it names; the operator knows the hub."""
    (finetune,) = objects(EXAMPLES / "hub" / "finetune.yaml")
    model = finetune["spec"]["baseModel"]["huggingFace"]
    data = finetune["spec"]["dataset"]["train"][0]["huggingFace"]
    rows = [{"instruction": "Repeat.", "input": str(number), "output": str(number)} for number in range(300)]
    helm = [*cluster_command[:-1], "helm"]
    upgrade = [*helm, "upgrade", "tuneserve", str(ROOT / "charts/tuneserve"), "--namespace", SYSTEM, "--reuse-values"]
    # The download runs on this small node; what follows it needs the GPU that is not there.
    small = "profiles.rtx-4090.resources.prepare.requests"
    with serve_hub(host_address(kubectl)) as hub:
        tiny = write_tiny_model(tmp_path / "model")
        hub.add_directory(model["repo"], tiny, branches=(model["revision"],), token="secret-of-the-user")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        hub.add_dataset(data["repo"], {"train.jsonl": lines.encode()})
        values = f"hub.endpoint={hub.endpoint},{small}.cpu=100m,{small}.memory=1Gi"
        run(upgrade, "--set", values, "--wait")
        yield finetune, hub.requests
    run([*helm, "rollback", "tuneserve"], "--namespace", SYSTEM, "--wait")


def test_the_hub_example_downloads_with_its_token_and_then_waits_for_a_gpu(
    kubectl: Kubectl, hub_of_the_example: tuple[Object, list[str]]
) -> None:
    finetune, requests = hub_of_the_example
    name = finetune["metadata"]["name"]
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}}
    kubectl.apply({**secret, "stringData": {"token": "secret-of-the-user"}})
    kubectl.apply_file(str(EXAMPLES / "hub" / "finetune.yaml"))
    kubectl.apply_file(str(EXAMPLES / "hub" / "modelserve.yaml"))

    found = kubectl.wait(
        "finetune",
        name,
        lambda seen: is_true("DataValid")(seen) and reason(seen) == "Unschedulable",
        timeout=TRAINED,
    )
    assert stage(found, "prepare")["state"] == "Succeeded"
    assert any("model.safetensors" in request for request in requests)
    assert "rtx-4090" in condition(found, "Reconciling")["message"]
    assert found["status"]["resolved"]["revision"]
    waiting = kubectl.wait("modelserve", name, lambda seen: bool(condition(seen, "Ready")), timeout=60)
    assert condition(waiting, "Ready")["status"] == "False"
    kubectl.delete("secret", "hub")


def run(command: list[str], *arguments: str) -> None:
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def reason(found: Object) -> str:
    return str(condition(found, "Reconciling").get("reason", ""))


def host_address(kubectl: Kubectl) -> str:
    """Where the pods of the one-node cluster reach this machine: its end of the node's link."""
    (node,) = json.loads(kubectl.run("get", "nodes", "-o", "json"))["items"]
    (address,) = (item["address"] for item in node["status"]["addresses"] if item["type"] == "InternalIP")
    return address.rsplit(".", 1)[0] + ".1"

"""What the chart makes of its values."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from chart.release import CHART, Helm, HelmError, Object, config_text, only
from support.kubectl import Kubectl
from tuneserve.api.schema import manifests
from tuneserve.config import OperatorConfig, parse_config

pytestmark = pytest.mark.controlplane

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def config(helm: Helm, values: Object | None = None) -> OperatorConfig:
    return parse_config(config_text(helm.template(values)))


def operator_pod(objects: list[Object]) -> Object:
    return only(objects, "Deployment")["spec"]["template"]


def test_lint_has_no_complaint(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm.run("lint", "--strict", str(CHART))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_shipped_profiles(helm: Helm) -> None:
    told = config(helm)
    gpu = told.profile(name=None, namespace="any")
    assert (gpu.name, gpu.device, gpu.resource, gpu.memory) == ("rtx-4090", "cuda", "nvidia.com/gpu", "24Gi")
    assert gpu.compute_capability == "8.9"
    assert gpu.node_selector == {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090"}
    assert gpu.images.server == "vllm/vllm-openai:v0.33.0"
    assert gpu.images.trainer.startswith("tuneserve/trainer:")
    cpu = told.profile(name="cpu", namespace="any")
    assert (cpu.device, cpu.resource) == ("cpu", None)
    assert cpu.server_args[:2] == ("--dtype", "float32")
    assert cpu.images.server.startswith("tuneserve/server:")


def test_the_default_profile_is_a_switch(helm: Helm) -> None:
    assert config(helm, {"defaultProfile": "cpu"}).profile(name=None, namespace="any").name == "cpu"


def test_a_profile_is_added_and_one_taken_out(helm: Helm) -> None:
    mine = {"device": "cuda", "resource": "example.com/gpu", "resources": {"train": {"requests": {"cpu": 2}}}}
    told = config(
        helm,
        {
            "profiles": {"mine": mine, "rtx-4090": None},
            "defaultProfile": "mine",
            "images": {"trainer": "registry.example/trainer@sha256:" + "0" * 64},
        },
    )
    assert [profile.name for profile in told.profiles] == ["cpu", "mine"]
    profile = told.profile(name=None, namespace="any")
    assert profile.resource == "example.com/gpu"
    assert profile.resources.train.requests == {"cpu": "2"}
    assert profile.images.trainer.startswith("registry.example/trainer@sha256:")


def test_images_of_a_profile_win(helm: Helm) -> None:
    values = {"images": {"server": "all:1"}, "profiles": {"cpu": {"images": {"server": "cpu:1"}}}}
    told = config(helm, values)
    assert told.profile(name="cpu", namespace="any").images.server == "cpu:1"
    assert told.profile(name="rtx-4090", namespace="any").images.server == "vllm/vllm-openai:v0.33.0"


@pytest.mark.parametrize(
    ("values", "look", "expected"),
    [
        ({"hub": {"endpoint": "https://hub.example"}}, lambda told: told.hub.endpoint, "https://hub.example"),
        ({}, lambda told: told.hub.endpoint, None),
        ({"artifacts": {"storageClass": "fast"}}, lambda told: told.artifacts.storage_class, "fast"),
        ({"artifacts": {"size": "1Ti"}}, lambda told: told.artifacts.size, "1Ti"),
        ({"artifacts": {"accessMode": "ReadWriteMany"}}, lambda told: told.artifacts.access_mode, "ReadWriteMany"),
        ({"watchNamespaces": ["a", "b"]}, lambda told: told.watch_namespaces, ("a", "b")),
        ({"leaderElection": {"leaseSeconds": 60}}, lambda told: told.leader_election.lease_seconds, 60),
        ({"workers": 2}, lambda told: told.workers, 2),
        ({"progressIntervalSeconds": 1}, lambda told: told.progress_interval_seconds, 1),
        ({"resyncSeconds": 86400}, lambda told: told.resync_seconds, 86400),
        (
            {"profiles": {"cpu": {"namespaces": ["team"]}}},
            lambda told: told.profile(name="cpu", namespace="team").namespaces,
            ("team",),
        ),
        (
            {"profiles": {"rtx-4090": {"runtimeClassName": "nvidia"}}},
            lambda told: told.profile(name="rtx-4090", namespace="any").runtime_class_name,
            "nvidia",
        ),
    ],
    ids=lambda given: "" if callable(given) else str(given),
)
def test_a_value_reaches_the_operator(
    helm: Helm, values: Object, look: Callable[[OperatorConfig], Any], expected: object
) -> None:
    assert look(config(helm, values)) == expected


def test_a_change_of_the_configuration_rolls_the_operator(helm: Helm) -> None:
    before, after = (operator_pod(helm.template(values)) for values in ({}, {"workers": 3}))
    assert before["metadata"]["annotations"]["checksum/config"] != after["metadata"]["annotations"]["checksum/config"]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"replica": 1}, "additional properties 'replica' not allowed"),
        ({"replicas": "one"}, "at '/replicas': got string, want integer"),
        ({"profiles": {"cpu": {"device": "tpu"}}}, "at '/profiles/cpu/device': value must be one of 'cuda', 'cpu'"),
        ({"profiles": {"cpu": {"gpus": 1}}}, "at '/profiles/cpu': additional properties 'gpus' not allowed"),
        ({"profiles": {"cpu": {"memory": "8Gi"}}}, "at '/profiles/cpu/memory'"),
        ({"profiles": {"Big": {"device": "cuda"}}}, "'Big' does not match pattern"),
        ({"profiles": {"mine": {}}}, "at '/profiles/mine': missing property 'device'"),
        ({"profiles": {"rtx-4090": {"computeCapability": 8.9}}}, "computeCapability': got number, want string"),
        ({"artifacts": {"size": "big"}}, "at '/artifacts/size': 'big' does not match pattern"),
        ({"hub": {"endpoint": "hub.example"}}, "at '/hub/endpoint': 'hub.example' does not match pattern"),
        ({"image": {"digest": "latest"}}, "at '/image/digest'"),
        ({"logFormat": "xml"}, "at '/logFormat': value must be one of 'json', 'text'"),
        ({"defaultProfile": "tpu"}, 'defaultProfile "tpu" is none of the profiles: cpu, rtx-4090'),
        (
            {"replicas": 2, "leaderElection": {"enabled": False}},
            "replicas must be 1 when leaderElection.enabled is false: several operators need a leader",
        ),
        (
            {"serviceAccount": {"create": False}},
            "serviceAccount.name must name an account that exists when serviceAccount.create is false",
        ),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_wrong_values_are_refused_with_a_sentence(helm: Helm, values: Object, sentence: str) -> None:
    with pytest.raises(HelmError) as refusal:
        helm.template(values)
    assert sentence in str(refusal.value)


def test_values_yaml_shows_every_value() -> None:
    # That the schema knows every value of values.yaml is what `helm lint` has shown.
    hidden = [path for path in _schema_paths(SCHEMA) if path[-1:] not in (("requests",), ("limits",), ("global",))]
    assert [".".join(path) for path in hidden if not _is_shown(VALUES, path)] == []


def _schema_paths(schema: Object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that the schema names; `*` stands for the name of a profile."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    yield path
    for name, child in schema.get("properties", {}).items():
        yield from _schema_paths(child, (*path, name))
    if path == ("profiles",):
        yield from _schema_paths(schema["additionalProperties"], (*path, "*"))


def _is_shown(values: Any, path: tuple[str, ...]) -> bool:
    if not path:
        return True
    if path[0] == "*":
        return any(_is_shown(child, path[1:]) for child in values.values())
    return path[0] in values and _is_shown(values[path[0]], path[1:])


# --- objects ---------------------------------------------------------------------------------------------------------


def test_the_kinds_are_those_of_the_models(helm: Helm) -> None:
    found = [item for item in helm.template() if item["kind"] == "CustomResourceDefinition"]
    wanted = [yaml.safe_load(text) for text in manifests().values()]
    assert {item["metadata"]["name"]: item["spec"] for item in found} == {
        item["metadata"]["name"]: item["spec"] for item in wanted
    }
    assert {item["metadata"]["annotations"]["helm.sh/resource-policy"] for item in found} == {"keep"}


def test_the_kinds_can_be_left_out_or_given_away(helm: Helm) -> None:
    def kinds(values: Object) -> list[Object]:
        return [item for item in helm.template(values) if item["kind"] == "CustomResourceDefinition"]

    assert kinds({"crds": {"enabled": False}}) == []
    assert [item["metadata"].get("annotations") for item in kinds({"crds": {"keep": False}})] == [None, None]


def test_the_operator_is_a_restricted_pod(helm: Helm, kubectl: Kubectl) -> None:
    template = operator_pod(helm.template())
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": copy.deepcopy(template["spec"])}
    kubectl.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "tuneserve"}})
    # The namespace enforces the restricted standard.
    kubectl.run("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
    (container,) = template["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert template["spec"]["enableServiceLinks"] is False
    assert {"requests", "limits"} == container["resources"].keys()
    ports = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert ports == {
        "startupProbe": {"path": "/healthz", "port": "http"},
        "livenessProbe": {"path": "/healthz", "port": "http"},
        "readinessProbe": {"path": "/readyz", "port": "http"},
    }


def test_the_image_by_tag_or_by_digest(helm: Helm) -> None:
    def image(values: Object) -> str:
        return operator_pod(helm.template({"image": values}))["spec"]["containers"][0]["image"]

    digest = "sha256:" + "0" * 64
    assert image({}) == "tuneserve/operator:0.1.0"
    assert image({"repository": "registry.example/op", "tag": "v2"}) == "registry.example/op:v2"
    assert (
        image({"repository": "registry.example/op", "tag": "v2", "digest": digest}) == f"registry.example/op@{digest}"
    )


def test_without_a_leader_there_are_never_two_operators(helm: Helm) -> None:
    alone = helm.template({"leaderElection": {"enabled": False}})
    assert only(alone, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert [item for item in alone if item["metadata"]["name"] == "tuneserve-lease"] == []


def test_a_disruption_budget_only_for_several(helm: Helm) -> None:
    def budgets(values: Object) -> list[Object]:
        return [item for item in helm.template(values) if item["kind"] == "PodDisruptionBudget"]

    assert budgets({}) == []
    (budget,) = budgets({"replicas": 2})
    labels = operator_pod(helm.template())["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_a_pod_monitor_on_request(helm: Helm) -> None:
    assert not [item for item in helm.template() if item["kind"] == "PodMonitor"]
    monitor = only(helm.template({"podMonitor": {"enabled": True, "interval": "10s"}}), "PodMonitor")
    assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "http", "path": "/metrics", "interval": "10s"}]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"nodeSelector": {"a": "b"}}, "nodeSelector"),
        ({"tolerations": [{"operator": "Exists"}]}, "tolerations"),
        ({"affinity": {"nodeAffinity": {}}}, "affinity"),
        ({"topologySpreadConstraints": [{"maxSkew": 1}]}, "topologySpreadConstraints"),
        ({"priorityClassName": "system"}, "priorityClassName"),
        ({"imagePullSecrets": [{"name": "registry"}]}, "imagePullSecrets"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_value_reaches_the_pod(helm: Helm, values: Object, field: str) -> None:
    assert operator_pod(helm.template(values))["spec"][field] == values[field]

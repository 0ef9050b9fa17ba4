"""The Deployment and the Service as they are wanted, and what a live Deployment tells."""

from typing import Any

import pytest

from support.finetunes import modelserve
from tuneserve import names
from tuneserve.api import ModelServe, ServedVersion
from tuneserve.config import Profile
from tuneserve.modelserve import server
from tuneserve.modelserve.deployment import build_deployment, rollout_of, selector, version_of
from tuneserve.modelserve.service import build_service

IMAGES = {"trainer": "t:1", "server": "s:1"}
CPU = Profile.model_validate(
    {
        "name": "cpu",
        "device": "cpu",
        "images": IMAGES,
        "serverArgs": ["--dtype", "float32", "--enforce-eager"],
        "serverEnv": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": 1}],
        "resources": {"server": {"requests": {"cpu": 1}, "limits": {"memory": "4Gi"}}},
    }
)
GPU = Profile.model_validate(
    {
        "name": "rtx-4090",
        "images": IMAGES,
        "nodeSelector": {"gpu": "4090"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "runtimeClassName": "nvidia",
        "imagePullPolicy": "Always",
    }
)
ARTIFACT = ServedVersion(version="0a", digest="sha256:0a", claim="mood-artifacts", path="merge/0a/model")
OWNER = names.owner_reference(
    {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "ModelServe", "metadata": {"name": "mood", "uid": "u"}}
)


def _modelserve(**spec: Any) -> ModelServe:
    body = modelserve("mood", finetune="mood", engine={})
    body["metadata"] |= {"namespace": "team", "uid": "u", "generation": 1}
    body["spec"] |= spec
    return ModelServe.model_validate(body)


def _deployment(*, version: ServedVersion = ARTIFACT, profile: Profile = CPU, **spec: Any) -> dict[str, Any]:
    return build_deployment(modelserve=_modelserve(**spec), owner=OWNER, version=version, profile=profile)


def _pod(body: dict[str, Any]) -> dict[str, Any]:
    return body["spec"]["template"]["spec"]


def _container(body: dict[str, Any]) -> dict[str, Any]:
    [container] = _pod(body)["containers"]
    return container


def _options(arguments: list[str]) -> dict[str, str]:
    """Options of a command line with their values; the last one counts, as for vLLM."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return {name: ("" if value.startswith("--") else value) for name, value in pairs if name.startswith("--")}


def _arguments(**arguments: Any) -> dict[str, str]:
    return _options(_container(_deployment(**arguments))["args"])


def test_it_is_owned_labelled_and_selected() -> None:
    body = _deployment(replicas=3)
    assert body["metadata"]["ownerReferences"] == [OWNER]
    assert body["spec"]["replicas"] == 3
    template = body["spec"]["template"]["metadata"]["labels"]
    assert body["spec"]["selector"]["matchLabels"] == selector("mood")
    assert selector("mood").items() <= template.items()
    service = build_service(modelserve=_modelserve(), owner=OWNER)
    assert service["spec"]["selector"] == selector("mood")


def test_a_rollout_starts_the_new_pod_before_it_ends_the_old_one() -> None:
    strategy = _deployment()["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_the_pod_is_restricted_and_knows_no_api() -> None:
    pod = _pod(_deployment())
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = _container(_deployment())["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_path_that_is_written_is_a_volume() -> None:
    container, volumes = _container(_deployment()), {item["name"]: item for item in _pod(_deployment())["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    writable = [path for path, volume in mounts.items() if "emptyDir" in volume]
    env = {item["name"]: item["value"] for item in container["env"]}
    directories = [name for name in env if name == "HOME" or name.endswith(("_DIR", "_ROOT", "_HOME"))]
    assert {"HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} <= set(directories)
    for name in directories:
        assert any(env[name] == path or env[name].startswith(f"{path}/") for path in writable), name


def test_nothing_is_fetched_or_reported() -> None:
    env = {item["name"]: item["value"] for item in _container(_deployment())["env"]}
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["VLLM_NO_USAGE_STATS"] == "1"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "1", "of the profile"


def test_one_start_up_budget_feeds_every_deadline() -> None:
    body = _deployment()
    probe = _container(body)["startupProbe"]
    env = {item["name"]: item["value"] for item in _container(body)["env"]}
    budget = probe["periodSeconds"] * probe["failureThreshold"]
    assert budget == server.STARTUP_SECONDS == int(env["VLLM_ENGINE_READY_TIMEOUT_S"])
    assert body["spec"]["progressDeadlineSeconds"] > budget
    assert probe["httpGet"]["path"] == _container(body)["readinessProbe"]["httpGet"]["path"] == "/health"


def test_a_drain_has_the_time_it_needs() -> None:
    body = _deployment()
    sleep = _container(body)["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(_arguments()["--shutdown-timeout"])
    assert sleep >= 5 and drain > 0
    assert _pod(body)["terminationGracePeriodSeconds"] >= sleep + drain + 10


class TestAnArtifact:
    def test_is_mounted_alone_and_read_only(self) -> None:
        body = _deployment()
        [mount] = [item for item in _container(body)["volumeMounts"] if item["name"] == "model"]
        assert mount == {"name": "model", "mountPath": "/model", "readOnly": True, "subPath": "merge/0a/model"}
        [volume] = [item for item in _pod(body)["volumes"] if item["name"] == "model"]
        assert volume["persistentVolumeClaim"] == {"claimName": "mood-artifacts", "readOnly": True}

    def test_is_served_with_its_own_template(self) -> None:
        assert _container(_deployment())["args"][0] == "/model"
        assert _arguments()["--chat-template"] == "/model/chat_template.jinja"


class TestAModelOnAClaim:
    version = ServedVersion(claim="models", path="llama/7b")

    def test_is_found_by_its_path_which_nobody_makes(self) -> None:
        body = _deployment(version=self.version)
        [mount] = [item for item in _container(body)["volumeMounts"] if item["name"] == "model"]
        assert "subPath" not in mount
        assert _container(body)["args"][0] == "/model/llama/7b"

    def test_at_the_root(self) -> None:
        assert _container(_deployment(version=ServedVersion(claim="models", path="")))["args"][0] == "/model"

    def test_brings_its_own_template(self) -> None:
        assert "--chat-template" not in _arguments(version=self.version)


class TestTheEngine:
    def test_by_default(self) -> None:
        options = _arguments()
        assert options["--served-model-name"] == "mood"
        assert options["--max-model-len"] == "auto"
        assert options["--dtype"] == "float32", "of the profile"
        assert "--gpu-memory-utilization" not in options, "there is no GPU"
        assert "--max-num-seqs" not in options

    def test_as_the_user_sets_it(self) -> None:
        options = _arguments(
            servedName="assistant", engine={"maxModelLength": 4096, "dtype": "BFloat16", "maxSequences": 8}
        )
        assert options["--served-model-name"] == "assistant"
        assert options["--max-model-len"] == "4096"
        assert options["--dtype"] == "bfloat16", "after that of the profile, so it counts"
        assert options["--max-num-seqs"] == "8"

    def test_on_gpus(self) -> None:
        spec = {"accelerator": {"count": 2}, "engine": {"gpuMemoryUtilization": "0.80"}}
        options = _arguments(profile=GPU, **spec)
        assert options["--gpu-memory-utilization"] == "0.80"
        assert options["--tensor-parallel-size"] == "2"
        assert "--dtype" not in options
        container = _container(_deployment(profile=GPU, **spec))
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "2"
        assert "--tensor-parallel-size" not in _arguments(profile=GPU)


class TestTheProfile:
    def test_decides_where_it_runs(self) -> None:
        pod = _pod(_deployment(profile=GPU))
        assert pod["nodeSelector"] == {"gpu": "4090"}
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
        assert pod["runtimeClassName"] == "nvidia"
        assert _container(_deployment(profile=GPU))["imagePullPolicy"] == "Always"

    def test_without_a_gpu_asks_for_none(self) -> None:
        container = _container(_deployment())
        assert container["resources"] == {"requests": {"cpu": "1"}, "limits": {"memory": "4Gi"}}
        assert not {"nodeSelector", "tolerations", "runtimeClassName"} & _pod(_deployment()).keys()


class TestTheTemplate:
    def test_changes_with_the_version_even_at_the_same_path(self) -> None:
        again = ARTIFACT.model_copy(update={"digest": "sha256:0b"})
        assert _hash(_deployment()) != _hash(_deployment(version=again))

    def test_does_not_change_with_the_replicas_or_the_time(self) -> None:
        later = ServedVersion.model_validate({**ARTIFACT.to_body(), "since": "2030-01-01T00:00:00Z"})
        assert _hash(_deployment()) == _hash(_deployment(replicas=7)) == _hash(_deployment(version=later))


def _hash(body: dict[str, Any]) -> str:
    return body["spec"]["template"]["metadata"]["annotations"][names.APPLIED]


# --- a live one ------------------------------------------------------------------------------------------------------


def _live(*, wanted: int = 2, **status: Any) -> dict[str, Any]:
    body = _deployment(replicas=wanted)
    body["metadata"]["generation"] = 5
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), wanted)
    body["status"] = {"observedGeneration": 5, **counts, **status}
    return body


def test_a_finished_rollout() -> None:
    rollout = rollout_of(_live())
    assert rollout.complete
    assert (rollout.wanted, rollout.ready, rollout.overdue, rollout.refused) == (2, 2, False, None)
    assert rollout.template == _hash(_live())


@pytest.mark.parametrize(
    "status",
    [
        {"observedGeneration": 4},
        {"updatedReplicas": 1},
        {"availableReplicas": 1},
        {"replicas": 3},
        {"replicas": 3, "updatedReplicas": 3, "availableReplicas": 3},
    ],
)
def test_an_unfinished_rollout(status: dict[str, int]) -> None:
    assert not rollout_of(_live(**status)).complete


def test_no_replicas_are_soon_complete() -> None:
    assert rollout_of(_live(wanted=0)).complete


def test_a_new_deployment_has_done_nothing_yet() -> None:
    body = _deployment()
    body["metadata"]["generation"] = 1
    rollout = rollout_of(body)
    assert (rollout.complete, rollout.total, rollout.available) == (False, 0, 0)


def test_conditions_of_the_deployment() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    quota = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota"}
    rollout = rollout_of(_live(conditions=[late, quota]))
    assert rollout.overdue
    assert rollout.refused == "exceeded quota"
    assert not rollout_of(_live(observedGeneration=4, conditions=[late])).overdue, "it tells of an older template"


def test_it_remembers_what_it_serves() -> None:
    assert version_of(_deployment()) == ARTIFACT
    assert version_of({"metadata": {}}) is None
    assert version_of({"metadata": {"annotations": {"tuneserve.dev/serves": "edited"}}}) is None

"""The Job of a stage: what its pod may do, where it runs, what it mounts, how its end is read."""

import json
from typing import Any

import pytest

from support.specs import config, finetune
from tuneserve.api import FineTune
from tuneserve.finetune import jobs
from tuneserve.finetune.children import JobView
from tuneserve.finetune.graph import STAGES
from tuneserve.finetune.ledger import StageRun
from tuneserve.finetune.specs import stage_spec
from tuneserve_pipeline.contract import Checkpoints, StageConfig

BY_NAME = {stage.name: stage for stage in STAGES}
DIGESTS = {("rows", "train.jsonl"): "d" * 64}


def launch(stage: str, *, profile: str = "rtx-4090", endpoint: str | None = None, **fields: Any) -> jobs.Launch:
    body = finetune(**fields)
    body["metadata"]["uid"] = "uid-1"
    fine_tune = FineTune.model_validate(body)
    parents = {name: (f"{name}-hash", f"sha256:{name}") for name in BY_NAME[stage].parents}
    return jobs.launch(
        fine_tune,
        stage=BY_NAME[stage],
        run=StageRun(stage, "0123456789abcdef"),
        spec=stage_spec(BY_NAME[stage], fine_tune.spec, digests=DIGESTS),
        inputs=jobs.stage_inputs(parents),
        profile=config().profile(name=profile, namespace="team"),
        hub_endpoint=endpoint,
    )


def pod(stage: str, **options: Any) -> dict[str, Any]:
    return launch(stage, **options).job["spec"]["template"]["spec"]


def container(stage: str, **options: Any) -> dict[str, Any]:
    (only,) = pod(stage, **options)["containers"]
    return only


def mounts(stage: str, **options: Any) -> dict[str, tuple[str, bool]]:
    """Mount path -> what is mounted there, and whether it can be written."""
    spec = pod(stage, **options)
    sources = {}
    for volume in spec["volumes"]:
        kind, source = next((key, value) for key, value in volume.items() if key != "name")
        name = source.get("claimName") or source.get("name") or source.get("secretName") or ""
        sources[volume["name"]] = f"{kind}/{name}"
    return {
        mount["mountPath"]: (sources[mount["name"]], not mount.get("readOnly", False))
        for mount in spec["containers"][0]["volumeMounts"]
    }


def test_names_labels_and_owner() -> None:
    made = launch("evaluate-merged")
    metadata = made.job["metadata"]
    assert metadata["name"] == "demo-evaluate-merged-0123456789"
    assert metadata["labels"] == {
        "app.kubernetes.io/managed-by": "tuneserve",
        "app.kubernetes.io/name": "finetune",
        "app.kubernetes.io/component": "evaluate",
        "tuneserve.dev/finetune": "demo",
        "tuneserve.dev/stage": "evaluate-merged",
        "tuneserve.dev/hash": "0123456789abcdef",
    }
    assert made.job["spec"]["template"]["metadata"]["labels"] == metadata["labels"]
    assert metadata["ownerReferences"][0]["uid"] == "uid-1" and metadata["ownerReferences"][0]["controller"]
    assert made.config_map["metadata"]["name"] == metadata["name"]


def test_labels_of_the_user_do_not_travel() -> None:
    body = finetune()
    body["metadata"] |= {"uid": "u", "labels": {"argocd.argoproj.io/instance": "x"}, "annotations": {"a": "b"}}
    fine_tune = FineTune.model_validate(body)
    made = jobs.launch(
        fine_tune,
        stage=BY_NAME["merge"],
        run=StageRun("merge", "0" * 16),
        spec=stage_spec(BY_NAME["merge"], fine_tune.spec, digests={}),
        inputs={},
        profile=config().profile(name=None, namespace="team"),
        hub_endpoint=None,
    )
    assert "argocd" not in json.dumps([made.job, made.config_map])
    assert set(made.job["metadata"]["annotations"]) == {jobs.TEMPLATE, jobs.TERMS}


def test_the_pod_meets_the_restricted_standard_and_reaches_no_api() -> None:
    spec = pod("train")
    context = spec["containers"][0]["securityContext"]
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["readOnlyRootFilesystem"] and context["capabilities"] == {"drop": ["ALL"]}
    assert context["allowPrivilegeEscalation"] is False
    assert spec["restartPolicy"] == "Never"
    assert "serviceAccountName" not in spec


def test_exit_codes_are_mapped() -> None:
    spec = launch("train", retries=5).job["spec"]
    codes = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert codes == {"FailJob": [64, 65, 85], "Ignore": [75]}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in spec[
        "podFailurePolicy"
    ]["rules"]
    assert (spec["backoffLimit"], spec["completions"], spec["podReplacementPolicy"]) == (5, 1, "Failed")


@pytest.mark.parametrize("stage", list(BY_NAME))
def test_the_command_and_what_the_stage_is_told(stage: str) -> None:
    made = launch(stage, endpoint="http://hub")
    told = StageConfig.model_validate_json(made.config_map["data"]["config.json"])
    kind = BY_NAME[stage].kind.value
    assert container(stage)["command"] == [
        "python",
        "-m",
        "tuneserve_pipeline",
        kind,
        "--config",
        "/etc/tuneserve/stage/config.json",
    ]
    assert (told.name, told.hash, told.spec.kind) == (stage, "0123456789abcdef", kind)
    assert {name: given.path for name, given in told.inputs.items()} == {
        name: f"/artifacts/{name}/{name}-hash" for name in BY_NAME[stage].parents
    }
    assert told.runtime.hub_endpoint == "http://hub"
    assert told.runtime.device == ("cuda" if BY_NAME[stage].uses_device else "cpu")


@pytest.mark.parametrize("stage", list(BY_NAME))
def test_only_stages_that_compute_take_a_gpu(stage: str) -> None:
    spec = pod(stage)
    limits = spec["containers"][0]["resources"]["limits"]
    preferred = spec.get("affinity", {}).get("nodeAffinity", {}).get("preferredDuringSchedulingIgnoredDuringExecution")
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if BY_NAME[stage].uses_device:
        assert limits["nvidia.com/gpu"] == "1"
        assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-GeForce-RTX-4090"}
        assert spec["runtimeClassName"] == "nvidia" and preferred is None
    else:
        assert "nvidia.com/gpu" not in limits and "nodeSelector" not in spec and "runtimeClassName" not in spec
        assert preferred[0]["preference"]["matchExpressions"][0]["values"] == ["NVIDIA-GeForce-RTX-4090"]


@pytest.mark.parametrize("stage", list(BY_NAME))
def test_a_cpu_profile_asks_for_no_gpu(stage: str) -> None:
    assert "gpu" not in json.dumps(container(stage, profile="cpu")["resources"])
    assert '"device": "cpu"' in launch(stage, profile="cpu").config_map["data"]["config.json"]


def test_a_training_gets_time_to_write_its_checkpoint() -> None:
    assert pod("train")["terminationGracePeriodSeconds"] == 120
    assert pod("merge")["terminationGracePeriodSeconds"] == 30


def test_settings_of_the_user_reach_the_job() -> None:
    spec = launch("train", deadlineSeconds=60, ttlSecondsAfterFinished=5, priorityClassName="high").job["spec"]
    assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (60, 5)
    assert spec["template"]["spec"]["priorityClassName"] == "high"
    assert "activeDeadlineSeconds" not in launch("train").job["spec"]


def test_mounts_of_prepare_and_of_any_other_stage() -> None:
    dataset = {
        "train": [
            {"claim": {"name": "data", "path": "a.jsonl"}},
            {"claim": {"name": "data", "path": "b.jsonl"}},
            {"claim": {"name": "base", "path": "c.jsonl"}},
            {"configMap": {"name": "rows", "key": "train.jsonl"}},
        ],
        "test": [{"configMap": {"name": "rows", "key": "train.jsonl"}}],
    }
    base = {"claim": {"name": "base", "path": "model"}, "tokenSecret": {"name": "hub", "key": "key"}}
    common = {
        "/artifacts": ("persistentVolumeClaim/demo-artifacts", True),
        "/base-model": ("persistentVolumeClaim/base", False),
        "/tmp": ("emptyDir/", True),
        "/dev/shm": ("emptyDir/", True),
    }
    assert mounts("prepare", dataset=dataset, baseModel=base) == {
        **common,
        "/etc/tuneserve/stage": ("configMap/demo-prepare-0123456789", False),
        "/datasets/data": ("persistentVolumeClaim/data", False),
        "/datasets/base": ("persistentVolumeClaim/base", False),
        "/datasets/train-3": ("configMap/rows", False),
        "/datasets/test-0": ("configMap/rows", False),
        "/etc/tuneserve/hub": ("secret/hub", False),
    }
    assert mounts("train", dataset=dataset, baseModel=base) == {
        **common,
        "/etc/tuneserve/stage": ("configMap/demo-train-0123456789", False),
    }
    claims = [volume for volume in pod("prepare", dataset=dataset)["volumes"] if "persistentVolumeClaim" in volume]
    assert len(claims) == 3, "one volume for each claim"
    (token,) = [volume for volume in pod("prepare", baseModel=base)["volumes"] if volume["name"] == "hub-token"]
    assert token["secret"]["items"] == [{"key": "key", "path": "token"}]


def test_only_the_download_may_reach_the_hub() -> None:
    offline = {stage: {"name": "HF_HUB_OFFLINE", "value": "1"} in container(stage)["env"] for stage in BY_NAME}
    assert offline == {stage: stage != "prepare" for stage in BY_NAME}


def test_how_a_training_is_interrupted_is_told_to_it_alone() -> None:
    def told(stage: str) -> Checkpoints:
        made = launch(stage, training={"checkpoints": {"steps": 7, "keep": 5}})
        return StageConfig.model_validate_json(made.config_map["data"]["config.json"]).runtime.checkpoints

    assert told("train") == Checkpoints(steps=7, keep=5)
    assert all(told(stage) == Checkpoints() for stage in BY_NAME if stage != "train")


def view(launched: jobs.Launch, **spec: Any) -> JobView:
    body = json.loads(json.dumps(launched.job))
    body["metadata"]["uid"] = "job-1"
    body["spec"].update(spec)
    return JobView.of(body, pods=())


@pytest.mark.parametrize(
    ("edit", "patch"),
    [
        ({}, None),
        ({"suspend": True}, {"suspend": True}),
        ({"deadlineSeconds": 5}, {"activeDeadlineSeconds": 5}),
        ({"retries": 1, "ttlSecondsAfterFinished": 7}, {"backoffLimit": 1, "ttlSecondsAfterFinished": 7}),
        ({"training": {"learningRate": "1"}}, None),
    ],
)
def test_what_may_change_while_a_job_runs(edit: dict[str, Any], patch: dict[str, Any] | None) -> None:
    found = jobs.adjustment(view(launch("train")), FineTune.model_validate(finetune(**edit)))
    assert (found and found["spec"]) == patch


def test_a_deadline_that_is_taken_back_is_removed_from_the_job() -> None:
    job = view(launch("train", deadlineSeconds=60))
    assert jobs.adjustment(job, FineTune.model_validate(finetune())) == {
        "spec": {"activeDeadlineSeconds": None},
        "metadata": {"annotations": {jobs.TERMS: "profile=rtx-4090 retries=3 deadlineSeconds=none"}},
    }


def test_the_template_is_the_same_as_long_as_nothing_changes() -> None:
    assert launch("train").template == launch("train", retries=1, deadlineSeconds=9, suspend=True).template
    assert launch("train").template != launch("train", priorityClassName="high").template
    assert launch("train").template != launch("train", profile="cpu").template

"""The Job of a stage and its ConfigMap, as the API server shall have them. Pure: same input, same objects."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneserve import names
from tuneserve.api import FineTune
from tuneserve.config import Profile
from tuneserve.finetune import volumes
from tuneserve.finetune.children import CONTAINER, JobView
from tuneserve.finetune.graph import Stage, StageKind
from tuneserve.finetune.ledger import StageRun
from tuneserve.podsecurity import container_security_context, pod_defaults
from tuneserve_pipeline.contract import (
    ARTIFACTS_PATH,
    CONFIG_PATH,
    METRICS_PORT,
    Checkpoints,
    ExitCode,
    Runtime,
    StageConfig,
    StageInput,
    StageSpec,
    canonical_json,
    output_path,
)

#: Hash of the pod template and the stage's config: a Job that has not started is replaced when they change.
TEMPLATE = "tuneserve.dev/template"
#: Settings that are no input of the stage but may decide whether it fails: when they change, it is tried again.
TERMS = "tuneserve.dev/terms"

#: Seconds from SIGTERM to SIGKILL: a training writes a checkpoint in that time.
_GRACE_SECONDS = {StageKind.TRAIN: 120}
_DEFAULT_GRACE_SECONDS = 30
_ENVIRONMENT = {
    "HOME": "/tmp",
    "HF_HOME": "/tmp/hf",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Everything that one stage needs to run."""

    config_map: Mapping[str, Any]
    job: Mapping[str, Any]

    @property
    def template(self) -> str:
        return str(self.job["metadata"]["annotations"][TEMPLATE])


def terms(fine_tune: FineTune, *, profile: str) -> str:
    """The settings of `TERMS`, readable."""
    deadline = fine_tune.spec.deadline_seconds
    return f"profile={profile} retries={fine_tune.spec.retries} deadlineSeconds={deadline or 'none'}"


def stage_inputs(parents: Mapping[str, tuple[str, str]]) -> dict[str, StageInput]:
    """Where the outputs of the parents lie in the pod; `parents` is stage -> (hash, digest)."""
    return {
        name: StageInput(path=f"{ARTIFACTS_PATH}/{output_path(stage=name, hash=hash)}", digest=digest)
        for name, (hash, digest) in parents.items()
    }


def launch(
    fine_tune: FineTune,
    *,
    stage: Stage,
    run: StageRun,
    spec: StageSpec,
    inputs: Mapping[str, StageInput],
    profile: Profile,
    hub_endpoint: str | None,
) -> Launch:
    """The ConfigMap and the Job that run the stage."""
    device = profile.device if stage.uses_device else "cpu"
    told = StageConfig(
        name=stage.name,
        hash=run.hash,
        spec=spec,
        inputs=inputs,
        runtime=Runtime(device=device, hub_endpoint=hub_endpoint, checkpoints=_checkpoints(fine_tune, stage=stage)),
    ).model_dump_json(indent=2)
    name = names.stage_job(finetune=fine_tune.metadata.name, stage=stage.name, hash=run.hash)
    labels = names.finetune_labels(
        finetune=fine_tune.metadata.name, component=stage.kind.value, stage=stage.name, hash=run.hash
    )
    owner = names.owner_reference(
        {
            "apiVersion": fine_tune.api_version,
            "kind": fine_tune.kind,
            "metadata": {"name": fine_tune.metadata.name, "uid": fine_tune.metadata.uid},
        }
    )
    metadata = {
        "name": name,
        "namespace": fine_tune.metadata.namespace,
        "labels": labels,
        "ownerReferences": [owner],
    }
    template = {"metadata": {"labels": labels}, "spec": _pod(fine_tune, stage=stage, name=name, profile=profile)}
    fingerprint = hashlib.sha256(canonical_json([template, told]).encode()).hexdigest()[:16]
    annotations = {TEMPLATE: fingerprint, TERMS: terms(fine_tune, profile=profile.name)}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata, "annotations": annotations},
        "spec": {
            **mutable_spec(fine_tune),
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules()},
            "template": template,
        },
    }
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {CONFIG_PATH.name: told},
    }
    return Launch(config_map=config_map, job=job)


def _checkpoints(fine_tune: FineTune, *, stage: Stage) -> Checkpoints:
    if stage.kind is not StageKind.TRAIN:
        return Checkpoints()  # or an edit would replace Jobs that it does not concern
    told = fine_tune.spec.training.checkpoints
    return Checkpoints(steps=told.steps, keep=told.keep)


def mutable_spec(fine_tune: FineTune) -> dict[str, Any]:
    """What may change while a Job runs."""
    spec = fine_tune.spec
    wanted: dict[str, Any] = {
        "suspend": spec.suspend,
        "backoffLimit": spec.retries,
        "ttlSecondsAfterFinished": spec.ttl_seconds_after_finished,
    }
    if spec.deadline_seconds is not None:
        wanted["activeDeadlineSeconds"] = spec.deadline_seconds
    return wanted


def adjustment(job: JobView, fine_tune: FineTune) -> dict[str, Any] | None:
    """The merge patch that brings the settings of a running Job up to date; None when they are."""
    wanted = {"activeDeadlineSeconds": None, **mutable_spec(fine_tune)}
    live = {"suspend": False, **job.spec}
    changes = {key: value for key, value in wanted.items() if live.get(key) != value}
    if not changes:
        return None
    patch: dict[str, Any] = {"spec": changes}
    profile = _term(job, "profile")
    if profile:
        patch["metadata"] = {"annotations": {TERMS: terms(fine_tune, profile=profile)}}
    return patch


def _term(job: JobView, name: str) -> str:
    terms = dict(part.partition("=")[::2] for part in job.annotations.get(TERMS, "").split())
    return terms.get(name, "")


def _failure_rules() -> list[dict[str, Any]]:
    """Exit codes that end the Job at once, and ends that are nobody's failure; any other end counts as a try."""
    final = [ExitCode.INVALID_CONFIG, ExitCode.INVALID_DATA, ExitCode.OUT_OF_MEMORY]
    return [
        _on_exit_codes("FailJob", final),
        _on_exit_codes("Ignore", [ExitCode.INTERRUPTED]),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _on_exit_codes(action: str, codes: list[ExitCode]) -> dict[str, Any]:
    values = sorted(int(code) for code in codes)
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": values}}


def _pod(fine_tune: FineTune, *, stage: Stage, name: str, profile: Profile) -> dict[str, Any]:
    mounted = volumes.of_stage(fine_tune, stage=stage, config_map=name)
    environment = dict(_ENVIRONMENT)
    if stage.kind is not StageKind.PREPARE:
        # Only the download may reach the hub; anything else works with what was resolved and recorded.
        environment["HF_HUB_OFFLINE"] = "1"
    pod: dict[str, Any] = {
        **pod_defaults(),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS.get(stage.kind, _DEFAULT_GRACE_SECONDS),
        **_placement(stage, profile=profile),
        "containers": [
            {
                "name": CONTAINER,
                "image": profile.images.trainer,
                "imagePullPolicy": profile.image_pull_policy,
                "command": ["python", "-m", "tuneserve_pipeline", stage.kind.value, "--config", str(CONFIG_PATH)],
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                "ports": [{"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}],
                "resources": _resources(stage, profile=profile),
                "securityContext": container_security_context(),
                "terminationMessagePolicy": "File",
                "volumeMounts": mounted.mounts,
            }
        ],
        "volumes": mounted.volumes,
    }
    if fine_tune.spec.priority_class_name is not None:
        pod["priorityClassName"] = fine_tune.spec.priority_class_name
    return pod


def _resources(stage: Stage, *, profile: Profile) -> dict[str, Any]:
    configured = getattr(profile.resources, stage.kind.value)
    requests, limits = dict(configured.requests), dict(configured.limits)
    if stage.uses_device and profile.resource is not None:
        requests[profile.resource] = limits[profile.resource] = "1"
    return {"requests": requests, "limits": limits}


def _placement(stage: Stage, *, profile: Profile) -> dict[str, Any]:
    """Where the pod may run. CPU stages prefer the nodes of the GPU stages: a node-local volume binds them together."""
    selector = dict(profile.node_selector)
    placement: dict[str, Any] = {}
    if stage.uses_device:
        if selector:
            placement["nodeSelector"] = selector
        if profile.runtime_class_name is not None:
            placement["runtimeClassName"] = profile.runtime_class_name
    elif selector:
        expressions = [{"key": key, "operator": "In", "values": [value]} for key, value in selector.items()]
        preference = {"weight": 100, "preference": {"matchExpressions": expressions}}
        placement["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preference]}}
    if profile.tolerations:
        placement["tolerations"] = [
            toleration.model_dump(by_alias=True, exclude_none=True) for toleration in profile.tolerations
        ]
    return placement

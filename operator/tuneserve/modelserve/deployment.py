"""The Deployment of a ModelServe, and what a live one tells: pure."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tuneserve import names
from tuneserve.api import ModelServe, ServedVersion
from tuneserve.config import Profile
from tuneserve.modelserve import server
from tuneserve.podsecurity import pod_defaults

COMPONENT = "server"
#: Annotation of the Deployment and of its pods: the version they serve, as JSON.
SERVES = "tuneserve.dev/serves"


def build_deployment(
    *, modelserve: ModelServe, owner: Mapping[str, Any], version: ServedVersion, profile: Profile
) -> dict[str, Any]:
    """The Deployment that serves `version`; `owner` is the reference to the ModelServe."""
    name, namespace = modelserve.metadata.name, modelserve.metadata.namespace
    labels = names.modelserve_labels(modelserve=name, component=COMPONENT)
    serves = json.dumps(version.model_copy(update={"since": None}).to_body(), sort_keys=True)
    template = {
        "metadata": {"labels": labels, "annotations": {SERVES: serves}},
        "spec": _pod_spec(modelserve=modelserve, version=version, profile=profile),
    }
    template["metadata"]["annotations"][names.APPLIED] = template_hash(template)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {SERVES: serves},
            "ownerReferences": [dict(owner)],
        },
        "spec": {
            "replicas": modelserve.spec.replicas,
            "selector": {"matchLabels": selector(name)},
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": server.PROGRESS_SECONDS,
            # A new version starts beside the old one: no replica is taken away before its successor answers.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def selector(modelserve: str) -> dict[str, str]:
    """Labels that select the server pods; immutable in a Deployment, so never change it."""
    return {**names.modelserve_selector(modelserve), names.COMPONENT: COMPONENT}


def template_hash(template: Mapping[str, Any]) -> str:
    """Identity of a pod template, by which pods of this and of an older rollout are told apart."""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def _pod_spec(*, modelserve: ModelServe, version: ServedVersion, profile: Profile) -> dict[str, Any]:
    spec: dict[str, Any] = {
        **pod_defaults(),
        "terminationGracePeriodSeconds": server.GRACE_SECONDS,
        # Process 1 of a PID namespace gets no signal that it does not handle: a server told to end while it still
        # loads would hold its GPU for the whole grace period.
        "shareProcessNamespace": True,
        "containers": [server.container(modelserve=modelserve, version=version, profile=profile)],
        "volumes": server.volumes(version),
        # A wish only: a claim of one node keeps all replicas there.
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(modelserve.metadata.name)},
            }
        ],
    }
    if profile.node_selector:
        spec["nodeSelector"] = dict(profile.node_selector)
    if profile.tolerations:
        spec["tolerations"] = [
            toleration.model_dump(by_alias=True, exclude_none=True) for toleration in profile.tolerations
        ]
    if profile.runtime_class_name is not None:
        spec["runtimeClassName"] = profile.runtime_class_name
    return spec


# --- what a live Deployment tells ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How far the Deployment is."""

    wanted: int
    total: int
    """Pods of this and of older templates that are not on their way out."""
    updated: int
    ready: int
    available: int
    complete: bool
    """All wanted pods run the current template and answer, and no others are left."""
    overdue: bool
    """No step was made for `PROGRESS_SECONDS`."""
    refused: str | None
    """Why the API server admits no pods, in its words."""
    template: str | None
    """`template_hash` of the current template."""


def rollout_of(live: Mapping[str, Any]) -> Rollout:
    spec, status = live.get("spec") or {}, live.get("status") or {}
    wanted = int(spec.get("replicas", 1))
    total, updated = int(status.get("replicas", 0)), int(status.get("updatedReplicas", 0))
    available = int(status.get("availableReplicas", 0))
    observed = int(status.get("observedGeneration", 0)) >= int(live["metadata"].get("generation", 0))
    conditions = {item["type"]: item for item in status.get("conditions") or ()}
    failure = conditions.get("ReplicaFailure", {})
    annotations = spec.get("template", {}).get("metadata", {}).get("annotations") or {}
    return Rollout(
        wanted=wanted,
        total=total,
        updated=updated,
        ready=int(status.get("readyReplicas", 0)),
        available=available,
        complete=observed and updated == wanted and total == wanted and available == wanted,
        overdue=observed and conditions.get("Progressing", {}).get("reason") == "ProgressDeadlineExceeded",
        refused=failure.get("message") if failure.get("status") == "True" else None,
        template=annotations.get(names.APPLIED),
    )


def version_of(live: Mapping[str, Any]) -> ServedVersion | None:
    """The version that a Deployment of ours serves or rolls out."""
    text = (live["metadata"].get("annotations") or {}).get(SERVES)
    if text is None:
        return None
    try:
        return ServedVersion.model_validate_json(text)
    except ValidationError:
        # Somebody edited it; the status still knows.
        return None

"""Names, labels, annotations and owner references of everything that the operator makes.

All names are deterministic: a reconcile that is repeated after a crash finds what it made before.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

#: Field manager of every server-side apply; never change it, or the old manager keeps its fields for ever.
FIELD_MANAGER = "tuneserve"

MANAGED_BY = "app.kubernetes.io/managed-by"
NAME = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
FINETUNE = "tuneserve.dev/finetune"
MODELSERVE = "tuneserve.dev/modelserve"
STAGE = "tuneserve.dev/stage"
HASH = "tuneserve.dev/hash"

MANAGER = "tuneserve"
#: What a watch or a list of our children selects.
MANAGED_SELECTOR = f"{MANAGED_BY}={MANAGER}"

#: Annotation with a hash of what was applied last: a field that is no longer wanted shows as a difference.
APPLIED = "tuneserve.dev/applied"
#: Annotation of a FineTune: comma-separated `<stage>[.<anything>]` that shall run again.
REBUILD = "tuneserve.dev/rebuild"
#: Prefix of the annotations on an artifacts claim that keep the finished outcomes: `<prefix><stage>.<hash>`.
OUTCOME_PREFIX = "outcome.tuneserve.dev/"

#: Longest DNS label, and longest label value.
NAME_LIMIT = 63
_DIGEST_LENGTH = 8


def limited(name: str, *, limit: int = NAME_LIMIT) -> str:
    """`name` itself, or when it is longer than `limit` its beginning and a hash of the whole."""
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{name[: limit - _DIGEST_LENGTH - 1].rstrip('-._')}-{digest}"


def artifacts_claim(finetune: str) -> str:
    """The claim that holds all outputs of a FineTune."""
    return limited(f"{finetune}-artifacts")


def stage_job(*, finetune: str, stage: str, hash: str) -> str:
    """The Job of one stage, and its ConfigMap."""
    return limited(f"{finetune}-{stage}-{hash[:10]}")


def finetune_labels(
    *, finetune: str, component: str, stage: str | None = None, hash: str | None = None
) -> dict[str, str]:
    """Labels of a child of a FineTune; `component` is the stage kind for Jobs."""
    labels = _labels(app="finetune", owner_label=FINETUNE, owner=finetune, component=component)
    if stage is not None:
        labels[STAGE] = limited(stage)
    if hash is not None:
        labels[HASH] = hash
    return labels


def finetune_selector(finetune: str) -> dict[str, str]:
    """Labels by which all children of a FineTune are listed."""
    return {MANAGED_BY: MANAGER, FINETUNE: limited(finetune)}


def modelserve_labels(*, modelserve: str, component: str) -> dict[str, str]:
    """Labels of a child of a ModelServe."""
    return _labels(app="modelserve", owner_label=MODELSERVE, owner=modelserve, component=component)


def modelserve_selector(modelserve: str) -> dict[str, str]:
    """Labels by which all children of a ModelServe are listed."""
    return {MANAGED_BY: MANAGER, MODELSERVE: limited(modelserve)}


def _labels(*, app: str, owner_label: str, owner: str, component: str) -> dict[str, str]:
    return {MANAGED_BY: MANAGER, NAME: app, COMPONENT: component, owner_label: limited(owner)}


def selector_text(labels: Mapping[str, str]) -> str:
    """Labels in the form of a label selector: `a=b,c=d`, sorted."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def owner_reference(body: Mapping[str, Any]) -> dict[str, Any]:
    """Reference that makes `body` (a whole object, with its UID) the controller of a child."""
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "name": body["metadata"]["name"],
        "uid": body["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def controller_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The owner reference of the object's controller."""
    for reference in body.get("metadata", {}).get("ownerReferences") or ():
        if reference.get("controller"):
            return dict(reference)
    return None

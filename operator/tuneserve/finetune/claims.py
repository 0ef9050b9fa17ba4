"""The artifacts claim of a FineTune: what it shall be, and what is wrong with the one that is there. Pure.

It outlives the FineTune unless its deletion policy says otherwise, and it can only grow.
"""

from collections.abc import Mapping
from typing import Any

from tuneserve import names
from tuneserve.api import DeletionPolicy, FineTune
from tuneserve.config import ArtifactsClaim
from tuneserve.difference import differs, quantity
from tuneserve.finetune.failures import Finding
from tuneserve.ownership import stranger

Body = Mapping[str, Any]


def desired(fine_tune: FineTune, *, defaults: ArtifactsClaim, live: Body | None) -> dict[str, Any]:
    """The claim as it shall be; what cannot be changed is taken from the live one."""
    asked = fine_tune.spec.output.claim
    access_mode = asked.access_mode.value if asked.access_mode is not None else defaults.access_mode
    spec: dict[str, Any] = {
        "accessModes": [access_mode],
        "resources": {"requests": {"storage": asked.size or defaults.size}},
    }
    storage_class = asked.storage_class or defaults.storage_class
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    if live is not None:
        spec = _keep(live["spec"], spec)
    metadata: dict[str, Any] = {
        "name": names.artifacts_claim(fine_tune.metadata.name),
        "namespace": fine_tune.metadata.namespace,
        "labels": names.finetune_labels(finetune=fine_tune.metadata.name, component="artifacts"),
    }
    if fine_tune.spec.output.deletion_policy is DeletionPolicy.DELETE:
        owner = {
            "apiVersion": fine_tune.api_version,
            "kind": fine_tune.kind,
            "metadata": {"name": fine_tune.metadata.name, "uid": fine_tune.metadata.uid},
        }
        metadata["ownerReferences"] = [names.owner_reference(owner)]
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def needs_change(wanted: Body, *, live: Body | None) -> bool:
    """Whether the claim must be made or changed. Fields that the API server filled in are no reason."""
    if live is None:
        return True
    orphaned = names.controller_of(wanted) is None and names.controller_of(live) is not None
    return orphaned or differs(wanted, live)


def is_ours(claim: Body, fine_tune: FineTune) -> bool:
    """Whether a claim of the right name was made for this FineTune, so that its annotations may be believed."""
    labels = claim["metadata"].get("labels") or {}
    wanted = names.finetune_selector(fine_tune.metadata.name)
    return all(labels.get(key) == value for key, value in wanted.items())


def fault(fine_tune: FineTune, *, defaults: ArtifactsClaim, live: Body | None) -> Finding | None:
    """Why nothing can be written to the live claim; None when it will do, or is yet to be made."""
    if live is None:
        return None
    name = live["metadata"]["name"]
    refusal = stranger(desired=desired(fine_tune, defaults=defaults, live=live), live=live)
    if refusal is not None:
        return Finding(
            reason="ClaimConflict", message=refusal.message, stalled=not refusal.passing, awaits_removal=refusal.passing
        )
    if live["metadata"].get("deletionTimestamp"):
        return Finding(
            reason="ClaimTerminating",
            message=f'PersistentVolumeClaim "{name}" is being deleted, as soon as no pod mounts it; a new, empty one '
            "is made then",
            stalled=False,
            awaits_removal=True,
        )
    if (live.get("status") or {}).get("phase") == "Lost":
        return Finding(
            reason="ClaimLost",
            message=f'the volume of PersistentVolumeClaim "{name}" is lost, and the artifacts with it: restore it, or '
            "delete the claim to make them again",
        )
    return _mismatch(fine_tune, live=live)


def _mismatch(fine_tune: FineTune, *, live: Body) -> Finding | None:
    """A claim that was kept from before, and differs where the spec insists."""
    asked, spec, name = fine_tune.spec.output.claim, live["spec"], live["metadata"]["name"]
    found = spec.get("storageClassName")
    modes = spec.get("accessModes") or []
    if asked.storage_class is not None and found != asked.storage_class:
        what = f'has storage class "{found}", but spec.output.claim.storageClass is "{asked.storage_class}"'
    elif asked.access_mode is not None and asked.access_mode.value not in modes:
        what = f"has access mode {', '.join(modes)}, but spec.output.claim.accessMode is {asked.access_mode.value}"
    else:
        return None
    return Finding(
        reason="ClaimConflict",
        message=f'PersistentVolumeClaim "{name}" {what}: neither can change; leave the field out to use the claim as '
        "it is, or delete the claim, and the artifacts with it",
    )


def _keep(live: Mapping[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The wanted spec with what the live claim cannot change, and never a smaller size."""
    before = ((live.get("resources") or {}).get("requests") or {}).get("storage")
    asked = wanted["resources"]["requests"]["storage"]
    smaller = before is not None and (quantity(asked) or 0) < (quantity(before) or 0)
    kept: dict[str, Any] = {
        "accessModes": live.get("accessModes") or wanted["accessModes"],
        "resources": {"requests": {"storage": before if smaller else asked}},
    }
    if live.get("storageClassName") is not None:
        kept["storageClassName"] = live["storageClassName"]
    return kept

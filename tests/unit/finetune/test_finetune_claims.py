"""The artifacts claim: defaults of the platform, and claims that were kept from before."""

from typing import Any

import pytest

from support.specs import finetune
from tuneserve.api import FineTune
from tuneserve.config import ArtifactsClaim
from tuneserve.finetune import claims

DEFAULTS = ArtifactsClaim(size="40Gi", storage_class="fast")
PLAIN = ArtifactsClaim(size="40Gi")


def fine_tune(**claim: str) -> FineTune:
    body = finetune(output={"claim": claim})
    body["metadata"]["uid"] = "uid-1"
    return FineTune.model_validate(body)


def live(**spec: Any) -> dict[str, Any]:
    made = claims.desired(fine_tune(), defaults=PLAIN, live=None)
    return {**made, "spec": {**made["spec"], "storageClassName": "standard", **spec}}


def test_defaults_come_from_the_platform_and_the_user_overrides_them() -> None:
    made = claims.desired(fine_tune(), defaults=DEFAULTS, live=None)
    assert made["metadata"]["name"] == "demo-artifacts" and "ownerReferences" not in made["metadata"]
    assert made["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "40Gi"}},
        "storageClassName": "fast",
    }
    asked = fine_tune(size="5Gi", storageClass="slow", accessMode="ReadWriteMany")
    assert claims.desired(asked, defaults=DEFAULTS, live=None)["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "slow",
    }


def test_other_defaults_change_no_claim_that_is_there() -> None:
    found = live()
    wanted = claims.desired(fine_tune(), defaults=DEFAULTS, live=found)
    assert wanted["spec"]["storageClassName"] == "standard"
    assert not claims.needs_change(wanted, live=found)


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [("40Gi", "50Gi", "50Gi"), ("40Gi", "40000Mi", "40Gi"), ("40Gi", "10Gi", "40Gi"), ("40Gi", "40960Mi", "40960Mi")],
)
def test_a_claim_can_only_grow(before: str, asked: str, after: str) -> None:
    found = live(resources={"requests": {"storage": before}})
    wanted = claims.desired(fine_tune(size=asked), defaults=PLAIN, live=found)
    assert wanted["spec"]["resources"]["requests"]["storage"] == after
    assert claims.needs_change(wanted, live=found) == (asked == "50Gi")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"storageClass": "slow"}, 'has storage class "standard", but spec.output.claim.storageClass is "slow"'),
        ({"accessMode": "ReadWriteMany"}, "has access mode ReadWriteOnce, but spec.output.claim.accessMode is"),
    ],
)
def test_a_kept_claim_that_cannot_be_what_is_asked_for(asked: dict[str, str], says: str) -> None:
    found = claims.fault(fine_tune(**asked), defaults=PLAIN, live=live())
    assert found is not None and found.reason == "ClaimConflict" and says in found.message


@pytest.mark.parametrize(
    ("change", "reason", "stalled"),
    [
        ({"status": {"phase": "Lost"}}, "ClaimLost", True),
        ({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}, "ClaimTerminating", False),
        ({"metadata": {"labels": {}}}, "ClaimConflict", True),
    ],
)
def test_claims_that_will_not_do(change: dict[str, Any], reason: str, stalled: bool) -> None:
    body = live()
    body = {**body, **change, "metadata": {**body["metadata"], **change.get("metadata", {})}}
    found = claims.fault(fine_tune(), defaults=PLAIN, live=body)
    assert found is not None and (found.reason, found.stalled) == (reason, stalled)
    assert claims.fault(fine_tune(), defaults=PLAIN, live=live()) is None

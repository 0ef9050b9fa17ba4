"""Whose objects may be changed."""

from typing import Any

from tuneserve import names
from tuneserve.ownership import stranger


def _owner(*, uid: str = "u1", name: str = "y") -> dict[str, Any]:
    return names.owner_reference(
        {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "ModelServe", "metadata": {"name": name, "uid": uid}}
    )


def _deployment(*, owner: dict[str, Any] | None, labels: dict[str, str] | None = None) -> dict[str, Any]:
    if labels is None:
        labels = names.modelserve_labels(modelserve="y", component="server")
    references = [owner] if owner else []
    return {"kind": "Deployment", "metadata": {"name": "y", "labels": labels, "ownerReferences": references}}


DESIRED = _deployment(owner=_owner())


def test_ours_by_uid_whatever_its_labels_became() -> None:
    assert stranger(desired=DESIRED, live=_deployment(owner=_owner(), labels={})) is None


def test_a_users_object_is_refused_with_advice() -> None:
    refusal = stranger(desired=DESIRED, live=_deployment(owner=None, labels={"app": "mine"}))
    assert refusal is not None
    assert not refusal.passing
    assert refusal.message == (
        'Deployment "y" exists and was not made by TuneServe: rename it, delete it, or choose another name'
    )


def test_an_object_of_another_controller_is_refused_and_named() -> None:
    helm = {"apiVersion": "v1", "kind": "Release", "name": "shop", "uid": "h", "controller": True}
    refusal = stranger(desired=DESIRED, live=_deployment(owner=helm))
    assert refusal is not None
    assert 'controlled by Release "shop"' in refusal.message


def test_what_a_deleted_owner_of_the_same_name_left_will_go_by_itself() -> None:
    refusal = stranger(desired=DESIRED, live=_deployment(owner=_owner(uid="old")))
    assert refusal is not None
    assert refusal.passing


def test_an_orphan_with_our_labels_is_adopted() -> None:
    assert stranger(desired=DESIRED, live=_deployment(owner=None)) is None


def test_an_orphan_of_another_object_is_not() -> None:
    labels = names.modelserve_labels(modelserve="other", component="server")
    assert stranger(desired=DESIRED, live=_deployment(owner=None, labels=labels)) is not None


def test_a_kept_claim_belongs_to_the_finetune_of_its_label() -> None:
    def claim(*, finetune: str | None, owner: dict[str, Any] | None = None) -> dict[str, Any]:
        labels = names.finetune_labels(finetune=finetune, component="artifacts") if finetune else {}
        references = [owner] if owner else []
        return {
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "x-artifacts", "labels": labels, "ownerReferences": references},
        }

    desired = claim(finetune="x")
    assert stranger(desired=desired, live=claim(finetune="x")) is None
    assert stranger(desired=desired, live=claim(finetune="x", owner=_owner())) is None
    assert stranger(desired=desired, live=claim(finetune="z")) is not None
    assert stranger(desired=desired, live=claim(finetune=None)) is not None


def test_an_object_without_labels_matches_nothing() -> None:
    bare = {"kind": "ConfigMap", "metadata": {"name": "c"}}
    assert stranger(desired=bare, live=bare) is not None

"""Whose key an event of a child becomes, and that kopf only watches."""

import asyncio
from typing import Any

import kopf
import pytest

from tuneserve import handlers, names
from tuneserve.workqueue import Key


def _child(*, labels: dict[str, str], controller: dict[str, str] | None = None) -> dict[str, Any]:
    references = [{**controller, "controller": True}] if controller else []
    return {"metadata": {"name": "c", "namespace": "team", "labels": labels, "ownerReferences": references}}


FINETUNE = {"apiVersion": "tuneserve.dev/v1alpha1", "kind": "FineTune", "name": "mood"}


@pytest.mark.parametrize(
    ("child", "key"),
    [
        (_child(labels={names.FINETUNE: "mood"}), Key("FineTune", "team", "mood")),
        (_child(labels={names.MODELSERVE: "shop"}), Key("ModelServe", "team", "shop")),
        (_child(labels={names.FINETUNE: "edited"}, controller=FINETUNE), Key("FineTune", "team", "mood")),
        (
            _child(
                labels={names.MODELSERVE: "shop"},
                controller={"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "shop-1"},
            ),
            Key("ModelServe", "team", "shop"),
        ),
        (_child(labels={names.MANAGED_BY: names.MANAGER}), None),
        ({"metadata": {"name": "c", "namespace": "team"}}, None),
    ],
)
def test_a_child_wakes_its_owner(child: dict[str, Any], key: Key | None) -> None:
    assert handlers.owner_key(child) == key


def test_only_event_handlers_are_registered() -> None:
    """Any other kind of handler would write annotations or finalizers."""
    registry = kopf.OperatorRegistry()
    handlers.register(registry, lambda key: None)
    assert len(list(registry._watching.get_all_handlers())) == 5
    for others in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert not list(others.get_all_handlers())


def test_built_in_kinds_are_watched_by_our_label_only() -> None:
    selectors = handlers.settings().watching.label_selectors
    for group, plural in (("batch", "jobs"), ("", "pods"), ("apps", "deployments")):
        resource = kopf.Resource(group=group, version="v1", plural=plural, kind=None, namespaced=True)
        assert selectors.collect(resource) == ["app.kubernetes.io/managed-by=tuneserve"], plural


async def test_a_handler_only_adds_a_key() -> None:
    keys: list[Key] = []
    registry = kopf.OperatorRegistry()
    handlers.register(registry, keys.append)
    by_name = {handler.fn.__name__: handler.fn for handler in registry._watching.get_all_handlers()}
    results = await asyncio.gather(
        by_name["finetune"](namespace="team", name="mood", body={}),
        by_name["modelserve"](namespace="team", name="shop", body={}),
        by_name["child"](body=kopf.Body(_child(labels={names.FINETUNE: "mood"}))),
    )
    assert results == [None, None, None], "kopf would write a result into the status"
    assert keys == [
        Key("FineTune", "team", "mood"),
        Key("ModelServe", "team", "shop"),
        Key("FineTune", "team", "mood"),
    ]

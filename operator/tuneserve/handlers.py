"""The watch layer: every event of an object becomes the key of its owner in the work queue, and nothing else.

The only module with kopf decorators. Handlers hold no state and no logic; no annotation, finalizer or event of kopf
is ever written.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import kopf

from tuneserve import metrics, names
from tuneserve.api import FINETUNES, GROUP, MODELSERVES, VERSION
from tuneserve.workqueue import Key

Add = Callable[[Key], None]


def owner_key(body: Mapping[str, Any]) -> Key | None:
    """The object that a child belongs to: by its controller, or, as a Job's pod has another one, by its label."""
    metadata = body["metadata"]
    namespace, labels = metadata["namespace"], metadata.get("labels") or {}
    controller = names.controller_of(body)
    if controller is not None and str(controller.get("apiVersion", "")).startswith(f"{GROUP}/"):
        # A label may have been edited; what the controller is called cannot be.
        return Key(controller["kind"], namespace, controller["name"])
    if names.FINETUNE in labels:
        return Key("FineTune", namespace, labels[names.FINETUNE])
    if names.MODELSERVE in labels:
        return Key("ModelServe", namespace, labels[names.MODELSERVE])
    return None


def register(registry: kopf.OperatorRegistry, add: Add) -> None:
    """Watch both kinds and their labelled children."""

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        # Explicit, because the implicit one imports whatever client it finds. An explicit KUBECONFIG wins, as in
        # `kube.py`: both halves must speak to the same cluster.
        if "KUBECONFIG" in os.environ:
            return kopf.login_with_kubeconfig(**kwargs)
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(GROUP, VERSION, FINETUNES, registry=registry)
    async def finetune(namespace: str | None, name: str, **_: Any) -> None:
        metrics.WATCH_EVENTS.labels(kind="FineTune").inc()
        add(Key("FineTune", namespace or "", name))

    @kopf.on.event(GROUP, VERSION, MODELSERVES, registry=registry)
    async def modelserve(namespace: str | None, name: str, **_: Any) -> None:
        metrics.WATCH_EVENTS.labels(kind="ModelServe").inc()
        add(Key("ModelServe", namespace or "", name))

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    @kopf.on.event("", "v1", "pods", registry=registry)
    @kopf.on.event("apps", "v1", "deployments", registry=registry)
    async def child(body: kopf.Body, **_: Any) -> None:
        metrics.WATCH_EVENTS.labels(kind=body.get("kind", "")).inc()
        key = owner_key(body)
        if key is not None:
            add(key)


def settings() -> kopf.OperatorSettings:
    """kopf as a watcher only."""
    s = kopf.OperatorSettings()
    s.peering.standalone = True  # a stray peering object must not freeze us; the Lease decides who leads
    s.scanning.disabled = True  # no watch of CRDs and namespaces, and no rights to them
    s.posting.enabled = False  # our own Events, with our own reasons
    s.persistence.finalizer = f"{GROUP}/finalizer"
    s.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    s.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP, v1=False)
    # The group, version and plural as a tuple or `plural.group`; other spellings are taken and match nothing.
    s.watching.label_selectors["batch", "v1", "jobs"] = names.MANAGED_SELECTOR
    s.watching.label_selectors["", "v1", "pods"] = names.MANAGED_SELECTOR
    s.watching.label_selectors["apps", "v1", "deployments"] = names.MANAGED_SELECTOR
    s.watching.chunk_size = 500
    s.watching.server_timeout, s.watching.client_timeout, s.watching.connect_timeout = 300, 310, 10
    s.networking.request_timeout, s.networking.connect_timeout = 30, 5
    s.networking.enforce_retry_after = True
    s.process.ultimate_exiting_timeout = 20
    return s

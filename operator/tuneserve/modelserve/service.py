"""The Service of a ModelServe, and the address that clients use: pure."""

from collections.abc import Mapping
from typing import Any

from tuneserve import names
from tuneserve.api import ModelServe
from tuneserve.modelserve import deployment, server

PORT = 80


def build_service(*, modelserve: ModelServe, owner: Mapping[str, Any]) -> dict[str, Any]:
    """A ClusterIP Service; pods that are not ready are no part of it, so none gets requests before it can answer."""
    name = modelserve.metadata.name
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": modelserve.metadata.namespace,
            "labels": names.modelserve_labels(modelserve=name, component=deployment.COMPONENT),
            "ownerReferences": [dict(owner)],
        },
        "spec": {
            "type": "ClusterIP",
            "selector": deployment.selector(name),
            "ports": [{"name": server.PORT_NAME, "port": PORT, "targetPort": server.PORT_NAME}],
        },
    }


def url(*, name: str, namespace: str) -> str:
    """Base URL of the OpenAI-compatible API inside the cluster."""
    return f"http://{name}.{namespace}.svc/v1"

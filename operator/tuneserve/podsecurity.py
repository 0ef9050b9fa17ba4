"""The restricted security profile of every pod that the operator makes, in one place.

Stages and servers share it, so that no pod can be forgotten when it is tightened.
"""

from typing import Any

#: User and group of every process in a stage or a server; the images create it.
UID = 10001


def pod_security_context() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": UID,
        "runAsGroup": UID,
        "fsGroup": UID,
        # A claim with a large model: do not walk through it at every start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security_context() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_defaults() -> dict[str, Any]:
    """Fields of a pod spec that keep the Kubernetes API and its addresses away from user code."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security_context(),
    }


def scratch_volume(name: str, *, size: str | None = None, memory: bool = False) -> dict[str, Any]:
    """An emptyDir; `size` is a quantity, `memory` puts it into RAM (counted against the pod's memory limit)."""
    empty: dict[str, Any] = {}
    if memory:
        empty["medium"] = "Memory"
    if size is not None:
        empty["sizeLimit"] = size
    return {"name": name, "emptyDir": empty}

"""Shared by the tests of the control plane: claims, and waiting for what serves."""

from support.kubectl import Kubectl, Object, is_true


def claim(name: str, *, size: str = "1Gi") -> Object:
    """A claim that is bound at once."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    }


def ready_modelserve(kubectl: Kubectl, name: str, *, timeout: float = 60) -> Object:
    """The ModelServe, as soon as it is Ready for its present generation."""
    return kubectl.wait("mserve", name, is_true("Ready"), timeout=timeout)

"""The kinds of objects that the operator reads or writes, and where the API server keeps them: pure."""

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote


class Kind(NamedTuple):
    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, *, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Path on the API server; without a namespace that of all namespaces."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if self.namespaced and namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        if subresource is not None:
            parts.append(subresource)
        return "/".join(parts)


POD = Kind("", "v1", "pods", "Pod")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
SERVICE = Kind("", "v1", "services", "Service")
CLAIM = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
NODE = Kind("", "v1", "nodes", "Node", namespaced=False)
EVENT = Kind("events.k8s.io", "v1", "events", "Event")
JOB = Kind("batch", "v1", "jobs", "Job")
DEPLOYMENT = Kind("apps", "v1", "deployments", "Deployment")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
STORAGE_CLASS = Kind("storage.k8s.io", "v1", "storageclasses", "StorageClass", namespaced=False)
FINETUNE = Kind("tuneserve.dev", "v1alpha1", "finetunes", "FineTune")
MODELSERVE = Kind("tuneserve.dev", "v1alpha1", "modelserves", "ModelServe")

_KINDS = {
    (kind.api_version, kind.kind): kind
    for kind in (
        POD,
        CONFIG_MAP,
        SERVICE,
        CLAIM,
        NODE,
        EVENT,
        JOB,
        DEPLOYMENT,
        LEASE,
        STORAGE_CLASS,
        FINETUNE,
        MODELSERVE,
    )
}


def kind_of(body: Mapping[str, Any]) -> Kind:
    """The kind that an object says it is; raises ValueError for one that the operator does not handle."""
    try:
        return _KINDS[body["apiVersion"], body["kind"]]
    except KeyError as error:
        raise ValueError(f"the operator handles no {body.get('apiVersion')} {body.get('kind')}") from error

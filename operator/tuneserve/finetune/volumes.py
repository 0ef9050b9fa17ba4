"""What a stage pod mounts, and where, by the contract of a stage. Pure."""

from dataclasses import dataclass, field
from typing import Any

from tuneserve import names
from tuneserve.api import FineTune
from tuneserve.finetune import references
from tuneserve.finetune.graph import Stage, StageKind
from tuneserve.podsecurity import scratch_volume
from tuneserve_pipeline.contract import (
    ARTIFACTS_PATH,
    BASE_MODEL_PATH,
    CONFIG_PATH,
    DATASETS_PATH,
    HUB_TOKEN_PATH,
)

#: Shared memory of the data loader's processes; counts against the memory of the pod.
_SHARED_MEMORY = "1Gi"


@dataclass
class Mounted:
    """Volumes of a pod and their mounts in its container."""

    volumes: list[dict[str, Any]] = field(default_factory=list)
    mounts: list[dict[str, Any]] = field(default_factory=list)
    _claims: dict[str, str] = field(default_factory=dict)

    def claim(self, claim: str, *, path: str, read_only: bool) -> None:
        """Mount a claim; one that is mounted already becomes no second volume, which some storage refuses."""
        volume = self._claims.get(claim)
        if volume is None:
            volume = self._claims[claim] = f"claim-{len(self._claims)}"
            self.volumes.append({"name": volume, "persistentVolumeClaim": {"claimName": claim}})
        mount: dict[str, Any] = {"name": volume, "mountPath": path}
        if read_only:
            mount["readOnly"] = True
        if mount not in self.mounts:
            self.mounts.append(mount)

    def file(self, volume: dict[str, Any], *, path: str) -> None:
        """Mount a volume of files that the pod only reads."""
        self.volumes.append(volume)
        self.mounts.append({"name": volume["name"], "mountPath": path, "readOnly": True})

    def scratch(self, volume: dict[str, Any], *, path: str) -> None:
        self.volumes.append(volume)
        self.mounts.append({"name": volume["name"], "mountPath": path})


def of_stage(fine_tune: FineTune, *, stage: Stage, config_map: str) -> Mounted:
    """Volumes and mounts of a stage; `config_map` has its configuration."""
    spec = fine_tune.spec
    mounted = Mounted()
    mounted.claim(names.artifacts_claim(fine_tune.metadata.name), path=str(ARTIFACTS_PATH), read_only=False)
    base = references.base_claim(spec)
    if base is not None:
        mounted.claim(base.name, path=str(BASE_MODEL_PATH), read_only=True)
    if stage.kind is StageKind.PREPARE:
        _add_data(mounted, fine_tune)
    mounted.file(
        {"name": "config", "configMap": {"name": config_map}},
        path=str(CONFIG_PATH.parent),
    )
    mounted.scratch(scratch_volume("tmp"), path="/tmp")
    mounted.scratch(scratch_volume("shm", size=_SHARED_MEMORY, memory=True), path="/dev/shm")
    return mounted


def _add_data(mounted: Mounted, fine_tune: FineTune) -> None:
    spec = fine_tune.spec
    for reference in references.data_claims(spec):
        mounted.claim(reference.name, path=f"{DATASETS_PATH}/{reference.name}", read_only=True)
    for item in references.config_maps(spec):
        place = f"{item.split}-{item.index}"
        source = {"name": item.name, "items": [{"key": item.key, "path": item.key}]}
        mounted.file({"name": f"data-{place}", "configMap": source}, path=f"{DATASETS_PATH}/{place}")
    token = spec.base_model.token_secret
    if token is not None:
        source = {"secretName": token.name, "items": [{"key": token.key, "path": HUB_TOKEN_PATH.name}]}
        # Readable by the group of the pod alone.
        mounted.file({"name": "hub-token", "secret": {**source, "defaultMode": 0o440}}, path=str(HUB_TOKEN_PATH.parent))

"""Objects of the namespace that a spec names: which there must be, and what is wrong with those that are missing.

Pure; looked at before a Job is made, because a pod that waits for a volume tells nobody why.
"""

import hashlib
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneserve.api import DataSource, FineTuneSpec
from tuneserve.finetune.failures import Finding
from tuneserve.finetune.graph import Stage, StageKind

Body = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClaimReference:
    name: str
    field: str
    """Path of the field in the spec, for messages."""


@dataclass(frozen=True, kw_only=True)
class ConfigMapReference:
    name: str
    key: str
    split: str
    index: int

    @property
    def field(self) -> str:
        return f"spec.dataset.{self.split}[{self.index}].configMap"


@dataclass(frozen=True, kw_only=True)
class References:
    """What was found in the namespace, by name; None: there is no such object."""

    claims: Mapping[str, Body | None] = field(default_factory=dict)
    config_maps: Mapping[str, Body | None] = field(default_factory=dict)


def base_claim(spec: FineTuneSpec) -> ClaimReference | None:
    """The claim with the base model, which every stage mounts."""
    claim = spec.base_model.claim
    return None if claim is None else ClaimReference(name=claim.name, field="spec.baseModel.claim")


def data_claims(spec: FineTuneSpec) -> tuple[ClaimReference, ...]:
    """The claims with data, which `prepare` mounts; one claim may be named several times."""
    return tuple(
        ClaimReference(name=source.claim.name, field=f"spec.dataset.{split}[{index}].claim")
        for split, index, source in data_sources(spec)
        if source.claim is not None
    )


def config_maps(spec: FineTuneSpec) -> tuple[ConfigMapReference, ...]:
    """The ConfigMaps with data, which `prepare` mounts."""
    return tuple(
        ConfigMapReference(name=source.config_map.name, key=source.config_map.key, split=split, index=index)
        for split, index, source in data_sources(spec)
        if source.config_map is not None
    )


def data_sources(spec: FineTuneSpec) -> Iterator[tuple[str, int, DataSource]]:
    """Every source with its split and its index therein."""
    data = spec.dataset
    for split, sources in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        for index, source in enumerate(sources):
            yield split, index, source


def digests(spec: FineTuneSpec, *, found: References) -> dict[tuple[str, str], str]:
    """sha256, in hex, of every ConfigMap key of the data set that is there."""
    contents = {
        (reference.name, reference.key): _content(found.config_maps.get(reference.name), reference.key)
        for reference in config_maps(spec)
    }
    return {key: hashlib.sha256(content).hexdigest() for key, content in contents.items() if content is not None}


def missing_config_map(spec: FineTuneSpec, *, found: References, namespace: str) -> Finding | None:
    """The first ConfigMap of the data set that is missing, or has not the key; without it no input is known."""
    for reference in config_maps(spec):
        body = found.config_maps.get(reference.name)
        if body is None:
            return Finding(
                reason="ConfigMapNotFound",
                message=f'ConfigMap "{reference.name}" ({reference.field}.name) does not exist in namespace '
                f"{namespace}: create it, or correct the name; the FineTune goes on by itself then",
            )
        if _content(body, reference.key) is None:
            keys = sorted({**(body.get("data") or {}), **(body.get("binaryData") or {})})
            return Finding(
                reason="ConfigMapKeyNotFound",
                message=f'ConfigMap "{reference.name}" in namespace {namespace} has no key "{reference.key}" '
                f"({reference.field}.key); it has: {', '.join(keys) or 'none'}",
            )
    return None


def missing_claim(stage: Stage, spec: FineTuneSpec, *, found: References, namespace: str) -> Finding | None:
    """The first claim that the stage mounts and that is missing or lost."""
    base = base_claim(spec)
    wanted = (() if base is None else (base,)) + (data_claims(spec) if stage.kind is StageKind.PREPARE else ())
    for reference in wanted:
        body = found.claims.get(reference.name)
        if body is None:
            return Finding(
                reason="ClaimNotFound",
                message=f'PersistentVolumeClaim "{reference.name}" ({reference.field}.name) does not exist in '
                f"namespace {namespace}: create it, or correct the name; {stage.name} starts by itself then",
            )
        if (body.get("status") or {}).get("phase") == "Lost":
            return Finding(
                reason="ClaimLost",
                message=f'the volume of PersistentVolumeClaim "{reference.name}" ({reference.field}.name) in '
                f"namespace {namespace} is lost: restore it, or name another claim",
            )
    return None


def _content(body: Body | None, key: str) -> bytes | None:
    if body is None:
        return None
    text = (body.get("data") or {}).get(key)
    if text is not None:
        return str(text).encode()
    binary = (body.get("binaryData") or {}).get(key)
    return None if binary is None else b64decode(binary)

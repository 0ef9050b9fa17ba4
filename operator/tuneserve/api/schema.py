"""The CRDs, generated from the models: `python -m tuneserve.api.schema` writes them, `--check` tells of a drift.

The manifests in `crds/` and their copy inside the chart are never edited by hand.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tuneserve.api.finetune import FineTune
from tuneserve.api.meta import CATEGORY, GROUP, VERSION
from tuneserve.api.modelserve import ModelServe
from tuneserve.api.rules import VALIDATIONS, Part
from tuneserve.api.structural import Schema, structural_schema

ROOT = Path(__file__).resolve().parents[3]
#: Both hold the same files: one for `kubectl apply`, one for the chart, which can only read its own folder.
DIRECTORIES = (Path("crds"), Path("charts/tuneserve/files/crds"))
#: Longer manifests do not fit into the annotation of a client-side `kubectl apply` (bytes).
SIZE_LIMIT = 262_144

_HEADER = "# Generated from operator/tuneserve/api by `make crds`; edit the models, not this file.\n"
_API_VERSION = "Version of the schema of this object: tuneserve.dev/v1alpha1."
_KIND = "Kind of this object: "


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of `kubectl get`; a wide one only with `-o wide`."""

    name: str
    path: str
    description: str
    type: str = "string"
    wide: bool = False

    def to_body(self) -> dict[str, Any]:
        body = {"name": self.name, "type": self.type, "jsonPath": self.path, "description": self.description}
        return {**body, "priority": 1} if self.wide else body


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model with the names and columns that its resource has."""

    model: type[Part]
    plural: str
    short: str
    columns: tuple[Column, ...]
    scale: bool = False

    @property
    def name(self) -> str:
        return self.model.__name__

    @property
    def file_name(self) -> str:
        return f"{GROUP}_{self.plural}.yaml"


_READY = Column(
    name="Ready",
    path='.status.conditions[?(@.type=="Ready")].status',
    description="Whether all that is asked for exists.",
)
_AGE = Column(
    name="Age", path=".metadata.creationTimestamp", type="date", description="Time since the object was created."
)
_PROFILE = Column(
    name="Profile", path=".spec.accelerator.profile", wide=True, description="Profile asked for; empty: the default."
)

KINDS = (
    Kind(
        model=FineTune,
        plural="finetunes",
        short="ftune",
        columns=(
            _READY,
            Column(name="Stage", path=".status.progress.stage", description="The stage that runs now."),
            Column(
                name="Progress", path=".status.progress.percent", type="integer", description="Percent of that stage."
            ),
            Column(name="Loss", path=".status.progress.loss", description="Latest training loss."),
            Column(
                name="Best metric",
                path=".status.artifacts[*].metrics[*].value",
                description="Main metric of the first export that is measured.",
            ),
            Column(name="Method", path=".spec.method", wide=True, description="Method of the training."),
            _PROFILE,
            Column(
                name="Attempt",
                path='.status.stages[?(@.state=="Running")].attempt',
                type="integer",
                wide=True,
                description="Attempt of the stage that runs now.",
            ),
            Column(
                name="ETA",
                path=".status.progress.etaSeconds",
                type="integer",
                wide=True,
                description="Seconds until the stage that runs now is done.",
            ),
            _AGE,
        ),
    ),
    Kind(
        model=ModelServe,
        plural="modelserves",
        short="mserve",
        scale=True,
        columns=(
            _READY,
            Column(name="Model", path=".spec.model.*.name", description="FineTune or claim that the model is from."),
            Column(name="Version", path=".status.served.version", description="Version that answers requests."),
            Column(
                name="Replicas", path=".status.readyReplicas", type="integer", description="Pods that answer requests."
            ),
            Column(name="URL", path=".status.url", description="Base URL of the API inside the cluster."),
            _PROFILE,
            _AGE,
        ),
    ),
)


def crd(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of `kind`."""
    subresources: dict[str, Any] = {"status": {}}
    if kind.scale:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short],
                "categories": [CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [column.to_body() for column in kind.columns],
                    "subresources": subresources,
                    "schema": {"openAPIV3Schema": _root_schema(kind)},
                }
            ],
        },
    }


def _root_schema(kind: Kind) -> Schema:
    """The schema with the three fields that the API server owns in the form that it wants, and an optional status."""
    schema = structural_schema(kind.model, omit=("apiVersion", "kind", "metadata"))
    spec, status = schema["properties"]["spec"], schema["properties"]["status"]
    del status["default"]
    root: Schema = {
        "description": schema["description"],
        "type": "object",
        "required": schema["required"],
        "properties": {
            "apiVersion": {"type": "string", "description": _API_VERSION},
            "kind": {"type": "string", "description": f"{_KIND}{kind.name}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    return {**root, VALIDATIONS: schema[VALIDATIONS]}


def manifests() -> dict[str, str]:
    """The manifests, by file name."""
    return {kind.file_name: _HEADER + _dump(crd(kind)) for kind in KINDS}


def _dump(body: dict[str, Any]) -> str:
    return yaml.dump(body, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes equal parts out again: an alias would be legal YAML and hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text that looks like a number is quoted: PyYAML reads 2e-4 as text, but Kubernetes as a number."""
    quoted = text[:1].isdigit() and text[-1:].isdigit()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _represent_text)


def stale(root: Path) -> list[Path]:
    """Paths below `root` that do not hold what would be generated now, or should not exist."""
    wanted = manifests()
    differing = [
        directory / name
        for directory in DIRECTORIES
        for name, text in wanted.items()
        if not (root / directory / name).is_file() or (root / directory / name).read_text() != text
    ]
    foreign = [
        path.relative_to(root)
        for directory in DIRECTORIES
        for path in sorted((root / directory).glob("*.yaml"))
        if path.name not in wanted
    ]
    return differing + foreign


def write(root: Path) -> None:
    for directory in DIRECTORIES:
        (root / directory).mkdir(parents=True, exist_ok=True)
        for name, text in manifests().items():
            (root / directory / name).write_text(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is not up to date")
    if not parser.parse_args(arguments).check:
        write(ROOT)
        return 0
    paths = stale(ROOT)
    for path in paths:
        print(f"{path} is not what the models say: run `make crds`", file=sys.stderr)
    return 1 if paths else 0


if __name__ == "__main__":
    sys.exit(main())

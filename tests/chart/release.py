"""helm and the cluster tool as users run them, and how to find an object in what the chart makes."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/tuneserve"
CLUSTER = "chart"
NAMESPACE = "tuneserve-system"
RELEASE = "tuneserve"

Object = dict[str, Any]


class HelmError(AssertionError):
    """helm said no; the message is its own."""


def cluster(*arguments: str) -> str:
    """Runs the cluster tool; its own words are the reason when it fails."""
    done = subprocess.run([ROOT / "cluster/cluster", *arguments], capture_output=True, text=True, timeout=280)
    if done.returncode:
        pytest.fail(f"cluster {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class Helm:
    """helm with the chart of this checkout."""

    command: tuple[str, ...]

    def run(self, *arguments: str, values: Object | None = None) -> str:
        """What helm prints; `values` are those that a user writes into a file."""
        given = () if values is None else ("--values", "-")
        done = subprocess.run(
            [*self.command, *arguments, "--namespace", NAMESPACE, *given],
            input=yaml.safe_dump(values or {}),
            capture_output=True,
            text=True,
            timeout=240,
        )
        if done.returncode:
            raise HelmError(done.stderr.strip())
        return done.stdout

    def template(self, values: Object | None = None) -> list[Object]:
        """All objects of the chart."""
        text = self.run("template", RELEASE, str(CHART), values=values or {})
        return [document for document in yaml.safe_load_all(text) if document]


def only(objects: list[Object], kind: str, name: str = RELEASE) -> Object:
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def config_text(objects: list[Object]) -> str:
    """The operator's configuration file."""
    return only(objects, "ConfigMap")["data"]["operator.yaml"]

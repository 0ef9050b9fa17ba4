"""FineTune and ModelServe objects for the tests, small enough for two cores."""

from typing import Any

from support import tiny
from support.kubectl import Object

LABELS = list(tiny.LABELS)


def finetune(name: str, *, steps: int = 4, data: str = "reviews.jsonl", **spec: Any) -> Object:
    """A classification on the tiny model; `spec` replaces or adds top-level fields."""
    return {
        "apiVersion": "tuneserve.dev/v1alpha1",
        "kind": "FineTune",
        "metadata": {"name": name},
        "spec": {
            "baseModel": {"claim": {"name": "tiny", "path": "model"}},
            "dataset": {"train": [{"claim": {"name": "data", "path": data}}]},
            "task": {"classification": {"labels": LABELS}},
            "training": training(steps=steps),
            "exports": [{"name": "merged", "format": "Merged"}],
            **spec,
        },
    }


def training(*, steps: int, **fields: Any) -> Object:
    return {
        "maxSteps": steps,
        "globalBatchSize": 8,
        "maxSequenceLength": 256,
        "learningRate": "1e-3",
        "checkpoints": {"steps": 2, "keep": 2},
        **fields,
    }


def modelserve(name: str, *, finetune: str, export: str = "merged", **spec: Any) -> Object:
    return {
        "apiVersion": "tuneserve.dev/v1alpha1",
        "kind": "ModelServe",
        "metadata": {"name": name},
        "spec": {
            "model": {"fineTune": {"name": finetune, "export": export}},
            "engine": {"maxModelLength": 256},
            **spec,
        },
    }


def artifact(found: Object, export: str) -> Object:
    """The artifact of that export in a FineTune's status."""
    return next(item for item in found["status"]["artifacts"] if item["export"] == export)

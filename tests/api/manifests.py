"""The smallest valid objects, and a way to say how a wrong one differs from them."""

import copy
from collections.abc import Mapping
from typing import Any

Object = dict[str, Any]

#: As the value of a change: the field is left out.
REMOVED = object()

FINETUNE: Object = {
    "apiVersion": "tuneserve.dev/v1alpha1",
    "kind": "FineTune",
    "metadata": {"name": "reviews"},
    "spec": {
        "baseModel": {"claim": {"name": "base-model"}},
        "dataset": {"train": [{"claim": {"name": "data", "path": "train.jsonl"}}]},
        "task": {"classification": {"labels": ["negative", "positive"]}},
    },
}
MODELSERVE: Object = {
    "apiVersion": "tuneserve.dev/v1alpha1",
    "kind": "ModelServe",
    "metadata": {"name": "reviews"},
    "spec": {"model": {"fineTune": {"name": "reviews"}}},
}
INSTRUCTION: Object = {"spec.task": {"instruction": {}}}


def changed(original: Object, changes: Mapping[str, Any]) -> Object:
    """A copy of `original` with the fields at dotted paths set, or `REMOVED`; parents come into being as needed."""
    result = copy.deepcopy(original)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return result

"""ModelServes that users get wrong."""

from collections.abc import Mapping
from typing import Any

from api.manifests import MODELSERVE, REMOVED
from api.wrong import LABEL, METADATA, PATH, Wrong


def _modelserve(name: str, changes: Mapping[str, Any], place: str, sentence: str) -> Wrong:
    return Wrong(name=name, changes=changes, place=place, sentence=sentence, original=MODELSERVE)


MODELSERVES = (
    _modelserve(
        "name that begins with a digit", {"metadata.name": "7b"}, "<nil>", f"{METADATA} with a letter and ending"
    ),
    _modelserve("no model", {"spec.model": REMOVED}, "spec.model", "Required value"),
    _modelserve("no form of model", {"spec.model": {}}, "spec.model", "must set exactly one of fineTune and claim"),
    _modelserve(
        "two forms of model",
        {"spec.model.claim": {"name": "models"}},
        "spec.model",
        "must set exactly one of fineTune and claim",
    ),
    _modelserve("a FineTune without a name", {"spec.model": {"fineTune": {}}}, "model.fineTune.name", "Required value"),
    _modelserve("an export with a capital", {"spec.model.fineTune.export": "Merged"}, "model.fineTune.export", LABEL),
    _modelserve(
        "a version that is a path",
        {"spec.model.fineTune.version": "../merge"},
        "spec.model.fineTune.version",
        "must be a version as listed in status.artifacts of the FineTune",
    ),
    _modelserve("a path that climbs", {"spec.model": {"claim": {"name": "models", "path": ".."}}}, "claim.path", PATH),
    _modelserve(
        "a served name with a space",
        {"spec.servedName": "my model"},
        "spec.servedName",
        "must be a model name for clients: letters, digits, '-', '_', '.', '/' and ':', "
        "starting with a letter or a digit",
    ),
    _modelserve("an unknown type", {"spec.engine": {"dtype": "int4"}}, "spec.engine.dtype", '"BFloat16", "Float16"'),
    _modelserve(
        "more memory than there is",
        {"spec.engine": {"gpuMemoryUtilization": "1.5"}},
        "spec.engine.gpuMemoryUtilization",
        'must be a decimal number in quotes, at least 0.05 and at most 1, such as "0.90"',
    ),
    _modelserve(
        "no context", {"spec.engine": {"maxModelLength": 0}}, "engine.maxModelLength", "greater than or equal to 16"
    ),
    _modelserve("no GPU", {"spec.accelerator": {"count": 0}}, "spec.accelerator.count", "greater than or equal to 1"),
    _modelserve("replicas below 0", {"spec.replicas": -1}, "spec.replicas", "greater than or equal to 0"),
    _modelserve("arguments of the engine", {"spec.engine": {"extraArgs": ["--trust"]}}, "extraArgs", "unknown field"),
)

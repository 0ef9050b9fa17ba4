"""Who works on a key, and who else must look when an object changes."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from tuneserve.api import ModelServe
from tuneserve.context import Context
from tuneserve.finetune.reconcile import reconcile as reconcile_finetune
from tuneserve.kinds import MODELSERVE
from tuneserve.modelserve.reconcile import reconcile as reconcile_modelserve
from tuneserve.workqueue import Key, Result


async def reconcile(key: Key, *, context: Context, add: Callable[[Key], None]) -> Result:
    """One pass over the object that the key names."""
    match key.kind:
        case "ModelServe":
            return await reconcile_modelserve(key, context)
        case "FineTune":
            # Asked afresh each time: what is remembered of a watch may be out of date. First, so that a FineTune
            # that cannot be reconciled does not hold up who serves its artifacts.
            for dependent in await dependents(key, context=context):
                add(dependent)
            return await reconcile_finetune(key, context)


async def dependents(key: Key, *, context: Context) -> list[Key]:
    """The ModelServes that serve an artifact of this FineTune."""
    bodies = await context.kube.list(MODELSERVE, key.namespace)
    return [Key("ModelServe", key.namespace, body["metadata"]["name"]) for body in bodies if serves(body, key.name)]


def serves(body: Mapping[str, Any], finetune: str) -> bool:
    """Whether a stored ModelServe refers to the FineTune; one that cannot be read does not."""
    try:
        model = ModelServe.model_validate(body).spec.model
    except ValidationError:
        return False
    return model.fine_tune is not None and model.fine_tune.name == finetune

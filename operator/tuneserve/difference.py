"""Whether a live object still is what was applied: pure, so that objects at rest cause no write.

Only what is wanted is compared: fields that others set (defaults of the API server, sidecars of an admission
webhook, `kubectl rollout restart`) are theirs. A field that is no longer wanted shows through the hash of the whole
wish, which is an annotation of every applied object (`with_hash`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from tuneserve import names

#: Lists of these items are maps: items are matched by their keys, and others may add items of their own.
_LIST_KEYS: tuple[tuple[str, ...], ...] = (
    ("mountPath",),
    ("containerPort",),
    ("uid",),
    ("name",),
    ("port",),
    ("topologyKey",),
)
#: Lists below these fields are replaced as a whole, whatever their items look like.
_ATOMIC = frozenset({"args", "command", "tolerations", "nodeSelectorTerms", "matchExpressions", "items", "rules"})
#: Maps below these fields hold quantities.
_QUANTITY_PARENTS = frozenset({"requests", "limits", "capacity", "hard"})
_QUANTITY_FIELDS = frozenset({"sizeLimit", "storage"})
_SUFFIXES = {
    "": Decimal(1),
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6,
    "G": Decimal(10) ** 9,
    "T": Decimal(10) ** 12,
    "P": Decimal(10) ** 15,
    "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10,
    "Mi": Decimal(2) ** 20,
    "Gi": Decimal(2) ** 30,
    "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50,
    "Ei": Decimal(2) ** 60,
}


def with_hash(body: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the object that carries a hash of itself as an annotation."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:16]
    metadata = dict(body["metadata"])
    metadata["annotations"] = {**(metadata.get("annotations") or {}), names.APPLIED: digest}
    return {**body, "metadata": metadata}


def differs(desired: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Whether anything wanted is missing from the live object or has another value there."""
    return not _within(desired, live, path=())


def quantity(text: Any) -> Decimal | None:
    """Value of a Kubernetes quantity such as `1500m`, `2Gi` or `1e3`; none when it is none."""
    if isinstance(text, bool):
        return None
    if isinstance(text, int | float):
        return Decimal(str(text))
    if not isinstance(text, str):
        return None
    digits = text.rstrip("numkKMGTPEi")
    factor = _SUFFIXES.get(text[len(digits) :])
    if factor is None:
        return None
    try:
        return Decimal(digits) * factor
    except InvalidOperation:
        return None


def _within(desired: Any, live: Any, *, path: tuple[str, ...]) -> bool:
    if isinstance(desired, Mapping):
        if not isinstance(live, Mapping):
            return not desired and live is None
        return all(_field_within(value, live, name=name, path=path) for name, value in desired.items())
    if isinstance(desired, list | tuple):
        # An empty list wishes for nothing: applying it removes no item that another manager added.
        return not desired or (isinstance(live, list) and _list_within(desired, live, path=path))
    if desired is None or desired == "":
        return live is None or live == ""
    if desired == live and isinstance(desired, bool) == isinstance(live, bool):
        return True
    if path and (path[-1] in _QUANTITY_FIELDS or (len(path) > 1 and path[-2] in _QUANTITY_PARENTS)):
        wanted = quantity(desired)
        return wanted is not None and wanted == quantity(live)
    return False


def _field_within(value: Any, live: Mapping[str, Any], *, name: str, path: tuple[str, ...]) -> bool:
    if name in live:
        return _within(value, live[name], path=(*path, name))
    # The API server leaves empty values out; a `false` or a zero that is gone may have been somebody's edit.
    return value is None or value in ("", [], {}, ())


def _list_within(desired: Sequence[Any], live: list[Any], *, path: tuple[str, ...]) -> bool:
    keys = None if path and path[-1] in _ATOMIC else _map_keys(desired)
    if keys is None:
        return len(desired) == len(live) and all(
            _within(wanted, found, path=path) for wanted, found in zip(desired, live, strict=True)
        )
    by_key = {tuple(item.get(key) for key in keys): item for item in live if isinstance(item, Mapping)}
    return all(
        (found := by_key.get(tuple(item.get(key) for key in keys))) is not None and _within(item, found, path=path)
        for item in desired
    )


def _map_keys(items: Sequence[Any]) -> tuple[str, ...] | None:
    if not items or not all(isinstance(item, Mapping) for item in items):
        return None
    return next((keys for keys in _LIST_KEYS if all(key in item for item in items for key in keys)), None)

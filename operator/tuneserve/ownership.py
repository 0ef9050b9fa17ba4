"""Whether an object that already has the wanted name may be changed: pure.

A forced apply would take over anything; so a live object that another object controls, or that a user made, is
refused with a sentence that says what to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneserve import names

_IDENTITY = (names.MANAGED_BY, names.FINETUNE, names.MODELSERVE)


@dataclass(frozen=True)
class Refusal:
    message: str
    passing: bool
    """It belonged to a deleted object of the same name and is about to be collected."""


def stranger(*, desired: Mapping[str, Any], live: Mapping[str, Any]) -> Refusal | None:
    """Why the live object may not be made the desired one; none when it may.

    Ours is what the same owner (by UID) controls, and what nobody controls but carries our identity labels: a claim
    that outlives its FineTune, or children whose owner was deleted with `--cascade=orphan`.
    """
    what = f'{live.get("kind", desired["kind"])} "{desired["metadata"]["name"]}"'
    theirs = (live.get("metadata") or {}).get("labels") or {}
    ours = desired["metadata"].get("labels") or {}
    same_identity = names.MANAGED_BY in ours and all(theirs.get(label) == ours.get(label) for label in _IDENTITY)
    wanted, found = names.controller_of(desired), names.controller_of(live)
    if found is not None and not (wanted is None and same_identity):
        if wanted is not None and found.get("uid") == wanted["uid"]:
            return None
        if wanted is not None and (found.get("kind"), found.get("name")) == (wanted["kind"], wanted["name"]):
            owner = f'{found["kind"]} "{found["name"]}"'
            return Refusal(
                f"{what} still belongs to the deleted {owner} and is made anew when it is gone", passing=True
            )
        return Refusal(
            f'{what} exists and is controlled by {found.get("kind")} "{found.get("name")}": '
            "rename one of the two, or delete the other",
            passing=False,
        )
    if same_identity:
        return None
    return Refusal(
        f"{what} exists and was not made by TuneServe: rename it, delete it, or choose another name", passing=False
    )

"""A manifest that a user gets wrong, with the sentence that the API server must answer with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from api.manifests import Object, changed

#: Sentences that several places share.
NAME = (
    "must be the name of an object: lower-case letters, digits, '-' and '.', "
    "starting and ending with a letter or a digit"
)
LABEL = "must consist of lower-case letters, digits and '-', and start and end with a letter or a digit"
PATH = "must be a path below the root of the claim: write it without a leading '/' and without '..'"
METADATA = "metadata.name must have at most 63 characters: lower-case letters, digits and '-', starting"


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A manifest, as its difference from a valid one, the place at fault, and what the user must read."""

    name: str
    changes: Mapping[str, Any]
    place: str
    sentence: str
    original: Object

    @property
    def manifest(self) -> Object:
        return changed(self.original, self.changes)


@dataclass(frozen=True, kw_only=True)
class WrongEdit:
    """An edit of a stored object that cannot be followed."""

    name: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    place: str
    sentence: str

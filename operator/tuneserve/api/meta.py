"""Types that both kinds share: metadata, conditions, references, and strings with bounds."""

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, PlainSerializer

from tuneserve.api.rules import DECIMAL_LENGTH, DECIMAL_PATTERN, ListMap, Part, Rule

GROUP: Final = "tuneserve.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = "tuneserve.dev/v1alpha1"
CATEGORY = "tuneserve"
INT32_MAX = 2**31 - 1
#: The API server keeps bounds as 64-bit floats and refuses a value beside a larger one ("must be of type int64").
LARGEST_INTEGER = 2**53

#: Longest text that a status field keeps; a longer one is cut, so that a status can always be written.
MESSAGE_LENGTH = 4096
#: Names become label values.
NAME_LENGTH = 63

_LABEL_PATTERN = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_SUBDOMAIN_PATTERN = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"


def _shorten(value: object) -> object:
    if isinstance(value, str) and len(value) > MESSAGE_LENGTH:
        return value[: MESSAGE_LENGTH - 1] + "…"
    return value


def _to_time(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


Time = Annotated[datetime, PlainSerializer(_to_time, return_type=str, when_used="json")]
Message = Annotated[str, BeforeValidator(_shorten), Field(max_length=MESSAGE_LENGTH)]
DecimalString = Annotated[str, Field(pattern=DECIMAL_PATTERN, max_length=DECIMAL_LENGTH)]
#: As above, but may be negative, as measured values may.
Measurement = Annotated[str, Field(pattern=DECIMAL_PATTERN.replace("^", "^-?"), max_length=24)]
Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
LargeCount = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]

DnsLabel = Annotated[
    str,
    Field(min_length=1, max_length=NAME_LENGTH),
    Rule(
        rule=f"self.matches('{_LABEL_PATTERN}')",
        message="must consist of lower-case letters, digits and '-', and start and end with a letter or a digit",
    ),
]
ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Rule(
        rule=f"self.matches('{_SUBDOMAIN_PATTERN}')",
        message="must be the name of an object: lower-case letters, digits, '-' and '.', "
        "starting and ending with a letter or a digit",
    ),
]
DataKey = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Rule(
        rule="self.matches('^[-._a-zA-Z0-9]+$') && !self.startsWith('..')",
        message="must be a key of its data: letters, digits, '-', '_' and '.'",
    ),
]
RelativePath = Annotated[
    str,
    Field(max_length=1024),
    Rule(
        rule="!self.startsWith('/') && !self.matches('(^|/)[.][.](/|$)')",
        message="must be a path below the root of the claim: write it without a leading '/' and without '..'",
    ),
]
HubRepo = Annotated[
    str,
    Field(min_length=1, max_length=193),
    Rule(
        rule="self.matches('^[A-Za-z0-9_][-A-Za-z0-9._]*(/[A-Za-z0-9_][-A-Za-z0-9._]*)?$')",
        message="must be a repository of the hub, written as owner/name without a URL",
    ),
]
HubRevision = Annotated[
    str,
    Field(min_length=1, max_length=255),
    Rule(
        rule="self.matches('^[A-Za-z0-9_][-A-Za-z0-9._/]*$') && !self.contains('..')",
        message="must be a commit, a tag or a branch: letters, digits, '-', '_', '.' and '/'",
    ),
]
Version = Annotated[
    str,
    Field(min_length=1, max_length=64),
    Rule(
        rule="self.matches('^[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$')",
        message="must be a version as listed in status.artifacts of the FineTune",
    ),
]
Quantity = Annotated[
    str,
    Field(min_length=1, max_length=32),
    Rule(
        rule="isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))",
        message="must be a quantity of bytes greater than 0, such as 20Gi",
    ),
]


class ObjectMeta(Part):
    """What the operator reads of an object's metadata."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: Mapping[str, str] = Field(default_factory=dict)
    annotations: Mapping[str, str] = Field(default_factory=dict)
    creation_timestamp: Time | None = None
    deletion_timestamp: Time | None = None


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Part):
    """One observation of the object's state."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    """What is observed, as an adjective or a participle."""
    status: ConditionStatus
    """Whether it holds: True, False, or Unknown."""
    observed_generation: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)] | None = None
    """Generation (metadata.generation) of the spec that this was observed for."""
    last_transition_time: Time
    """When status changed last."""
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """Why, as one CamelCase word for programs."""
    message: Message
    """Why, and what to do, as a sentence for people."""


Conditions = Annotated[tuple[Condition, ...], ListMap("type"), Field(max_length=16)]


class ClaimFile(Part):
    """A file on a PersistentVolumeClaim of the same namespace."""

    name: ObjectName
    """Name of the PersistentVolumeClaim. It is mounted read-only."""
    path: Annotated[RelativePath, Field(min_length=1)]
    """Path of the file below the root of the claim, such as "tweets/train.jsonl"."""


class ClaimDirectory(Part):
    """A directory on a PersistentVolumeClaim of the same namespace."""

    name: ObjectName
    """Name of the PersistentVolumeClaim. It is mounted read-only."""
    path: RelativePath = ""
    """Path of the directory below the root of the claim; left out: the root itself."""


class ConfigMapKey(Part):
    """One key of a ConfigMap of the same namespace."""

    name: ObjectName
    """Name of the ConfigMap."""
    key: DataKey
    """Key that holds the text of the file. An edit of its content is noticed and prepares the data again."""


class SecretKey(Part):
    """One key of a Secret of the same namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: DataKey = "token"
    """Key that holds the token."""

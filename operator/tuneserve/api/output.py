"""What a FineTune puts out: exports, how they are measured, what they must reach, and where they are kept."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tuneserve.api.meta import INT32_MAX, DecimalString, DnsLabel, ObjectName, Quantity
from tuneserve.api.rules import Part, Rule, decimal


class ExportFormat(StrEnum):
    ADAPTER = "Adapter"
    MERGED = "Merged"


class Export(Part):
    """One artifact that shall exist."""

    name: Annotated[DnsLabel, Field(max_length=32)]
    """Name of the artifact, unique in this FineTune; a ModelServe and gates refer to it."""
    format: ExportFormat
    """Adapter: the trained adapter alone. Merged: a whole 16-bit model with the adapter merged into its base; of
    method Full, the trained model itself."""


class Evaluation(Part):
    """How the exports are measured on the test rows."""

    max_samples: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    """Test rows to evaluate at most, the first ones. Left out: all of them."""


class GateMetric(StrEnum):
    ACCURACY = "accuracy"
    MACRO_F1 = "macroF1"
    INVALID_RATIO = "invalidRatio"
    EXACT_MATCH = "exactMatch"
    TOKEN_ACCURACY = "tokenAccuracy"


Threshold = Annotated[DecimalString, decimal(at_least=0, at_most=1, example="0.80", hint='; write 80 % as "0.80"')]


class Gate(Part):
    """A condition that an export must meet before it is served."""

    one_of = ("at_least", "at_most")

    metric: GateMetric
    """Metric of the evaluation, a share from 0 to 1. Classification: accuracy, macroF1, invalidRatio (answers that
    are no label). Text: tokenAccuracy (tokens that are the model's first choice). All other tasks:
    exactMatch."""
    export: Annotated[DnsLabel, Field(max_length=32)] | None = None
    """Name of the export that must meet it. Left out: each of them."""
    at_least: Threshold | None = None
    """Lowest value that passes, as a decimal number in quotes from 0 to 1."""
    at_most: Threshold | None = None
    """Highest value that passes, as a decimal number in quotes from 0 to 1."""


class AccessMode(StrEnum):
    READ_WRITE_ONCE = "ReadWriteOnce"
    READ_WRITE_MANY = "ReadWriteMany"


class OutputClaim(Part):
    """The PersistentVolumeClaim, named after the FineTune with "-artifacts", that holds all outputs."""

    rules = (
        Rule(
            rule="!has(oldSelf.size) || has(self.size) && "
            "(!isQuantity(self.size) || quantity(self.size).compareTo(quantity(oldSelf.size)) >= 0)",
            message="must not shrink: a claim can only grow; write the old size or a larger one",
            field_path=".size",
        ),
        Rule(
            rule="has(self.storageClass) == has(oldSelf.storageClass) && "
            "(!has(self.storageClass) || self.storageClass == oldSelf.storageClass)",
            message="must not change: a claim keeps its storage class; delete the FineTune and its claim to move it",
            field_path=".storageClass",
        ),
        Rule(
            rule="has(self.accessMode) == has(oldSelf.accessMode) && "
            "(!has(self.accessMode) || self.accessMode == oldSelf.accessMode)",
            message="must not change: a claim keeps its access mode; delete the FineTune and its claim to change it",
            field_path=".accessMode",
        ),
    )

    size: Quantity | None = None
    """Size of the claim, such as 40Gi; it may grow later. Left out: the platform's default."""
    storage_class: ObjectName | None = None
    """Storage class of the claim. Left out: the platform's default, or else the cluster's."""
    access_mode: AccessMode | None = None
    """Access mode of the claim. Left out: the platform's default."""


class DeletionPolicy(StrEnum):
    RETAIN = "Retain"
    DELETE = "Delete"


class Output(Part):
    """Where artifacts are kept and for how long."""

    claim: OutputClaim = OutputClaim()
    """The claim that holds them."""
    deletion_policy: DeletionPolicy = DeletionPolicy.RETAIN
    """What becomes of the claim when the FineTune is deleted. Retain: it stays, and a FineTune that is created again
    finds its artifacts. Delete: it goes too."""

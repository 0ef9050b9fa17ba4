"""What the operator tells about a FineTune."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tuneserve.api.meta import (
    LARGEST_INTEGER,
    Conditions,
    Count,
    DecimalString,
    LargeCount,
    Measurement,
    Message,
    Time,
)
from tuneserve.api.rules import ListMap, Part

Short = Annotated[str, Field(max_length=253)]
Digest = Annotated[str, Field(max_length=128)]


class Resolved(Part):
    """What the declared inputs turned out to be."""

    revision: Short | None = None
    """Commit of the base model on the hub; none for a model on a claim."""
    dataset_digest: Digest | None = None
    """Digest of the prepared rows."""
    template_hash: Digest | None = None
    """Digest of the chat template that the model is trained, evaluated and served with."""


class StageState(StrEnum):
    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class StageStatus(Part):
    """One stage of the current spec."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the stage, such as train or evaluate-merged."""
    hash: Annotated[str, Field(max_length=64)] | None = None
    """Identity of the stage's inputs; none while they are not known."""
    state: StageState
    """Pending, Running, Succeeded, Failed or Suspended."""
    attempt: Count | None = None
    """Number of the attempt, from 1."""
    job: Short | None = None
    """Name of the Job; none for a stage whose output was found."""
    node: Short | None = None
    """Node that the stage runs or ran on last."""
    start_time: Time | None = None
    """When the stage's Job started."""
    completion_time: Time | None = None
    """When the stage succeeded or failed."""
    reason: Annotated[str, Field(max_length=128)] | None = None
    """Why the stage waits or failed, as one CamelCase word for programs."""
    message: Message | None = None
    """Why the stage waits or failed, and what to do, as a sentence for people."""
    terms: Short | None = None
    """Settings under which the stage failed that are no input of it, such as the profile. When they change, it is
    tried again; none: its inputs are wrong, and only other inputs help."""


class Progress(Part):
    """The stage that runs now, refreshed at most every few seconds."""

    stage: Annotated[str, Field(max_length=63)] | None = None
    """Name of the stage."""
    percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of the stage that is done, in percent."""
    eta_seconds: Count | None = None
    """Seconds until the stage is done, as estimated by its pace so far."""
    step: Count | None = None
    """Optimizer steps done."""
    total_steps: Count | None = None
    """Optimizer steps in all."""
    loss: Measurement | None = None
    """Latest training loss, in nats per token."""
    tokens_per_second: DecimalString | None = None
    """Tokens, without padding, that the training takes in each second."""


class Metric(Part):
    """One measured value of an artifact."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the metric, such as accuracy."""
    value: Measurement
    """Value of the artifact on the test rows."""
    base: Measurement | None = None
    """Value of the base model on the same rows."""


class Verdict(StrEnum):
    PASSED = "Passed"
    FAILED = "Failed"
    PENDING = "Pending"


class Artifact(Part):
    """The finished artifact of one export."""

    export: Annotated[str, Field(min_length=1, max_length=63)]
    """Name of the export."""
    version: Annotated[str, Field(max_length=64)]
    """Identity of the artifact; it changes exactly when the inputs of its stage change."""
    claim: Short
    """PersistentVolumeClaim that holds it."""
    path: Annotated[str, Field(max_length=1024)]
    """Directory below the root of the claim. Its content never changes."""
    size_bytes: LargeCount | None = None
    """Size of all its files in bytes."""
    digest: Digest | None = None
    """Digest over the paths and contents of its files."""
    metrics: Annotated[tuple[Metric, ...], ListMap("name"), Field(max_length=32)] = ()
    """Measured values, the task's main metric first."""
    verdict: Verdict
    """Passed: all gates hold. Failed: one does not. Pending: it is not measured yet."""
    reason: Message | None = None
    """The gates that do not hold, with the values measured."""


class FineTuneStatus(Part):
    """What exists, and what is going on."""

    observed_generation: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)] | None = None
    """Generation (metadata.generation) of the spec that this status tells about."""
    conditions: Conditions = ()
    """Ready: all exports exist. Reconciling: stages are running or waiting. Stalled: only an edit or a rebuild helps.
    DataValid, Trained, Exported and Evaluated tell how far the stages are."""
    resolved: Resolved | None = None
    """What the declared inputs turned out to be."""
    stages: Annotated[tuple[StageStatus, ...], ListMap("name"), Field(max_length=64)] = ()
    """The stages of the current spec."""
    progress: Progress | None = None
    """The stage that runs now."""
    artifacts: Annotated[tuple[Artifact, ...], ListMap("export"), Field(max_length=16)] = ()
    """The finished artifacts, by export."""

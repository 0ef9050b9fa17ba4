"""ModelServe: an artifact, served by an OpenAI-compatible endpoint."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from tuneserve.api.meta import (
    API_VERSION,
    LARGEST_INTEGER,
    NAME_LENGTH,
    ClaimDirectory,
    Conditions,
    Count,
    DecimalString,
    DnsLabel,
    ObjectMeta,
    Time,
    Version,
)
from tuneserve.api.rules import Part, Rule, decimal


class FineTuneReference(Part):
    """An artifact of a FineTune of the same namespace."""

    name: DnsLabel
    """Name of the FineTune."""
    export: Annotated[DnsLabel, Field(max_length=32)] = "merged"
    """Name of one of its exports, of format Merged."""
    version: Version | None = None
    """Version to serve. Left out: the latest one that passes the gates of the FineTune."""


class ServedModel(Part):
    """The model to serve."""

    one_of = ("fine_tune", "claim")

    fine_tune: FineTuneReference | None = None
    """An export of a FineTune; a new version is rolled out when it passes its gates."""
    claim: ClaimDirectory | None = None
    """A directory on a PersistentVolumeClaim with the model's safetensors, config.json and tokenizer."""


class DataType(StrEnum):
    AUTO = "Auto"
    BFLOAT16 = "BFloat16"
    FLOAT16 = "Float16"
    FLOAT32 = "Float32"


class Engine(Part):
    """Settings of the inference engine."""

    max_model_length: Annotated[int, Field(ge=16, le=10_485_760)] | None = None
    """Longest conversation in tokens, prompt and answer together. Left out: what the model allows and memory holds."""
    dtype: DataType = DataType.AUTO
    """Type of the weights in memory. Auto: that of the profile, or else that of the model."""
    gpu_memory_utilization: Annotated[DecimalString, decimal(at_least=0.05, at_most=1, example="0.90")] = "0.90"
    """Share of the GPU's memory that the engine may take, from 0.05 to 1, as a decimal number in quotes."""
    max_sequences: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Requests that are answered at the same time; more wait. Left out: the engine's default."""


class ModelServeAccelerator(Part):
    """The kind of machine to serve on."""

    profile: DnsLabel | None = None
    """Name of a profile that the platform offers, such as rtx-4090 or cpu. Left out: the platform's default."""
    count: Annotated[int, Field(ge=1, le=16)] = 1
    """GPUs of each replica; the model is spread over them. Profiles without a GPU take 1."""


class ModelServeSpec(Part):
    """What shall be served."""

    model: ServedModel
    """The model to serve."""
    served_name: (
        Annotated[
            str,
            Field(min_length=1, max_length=128),
            Rule(
                rule="self.matches('^[A-Za-z0-9][-A-Za-z0-9._/:]*$')",
                message="must be a model name for clients: letters, digits, '-', '_', '.', '/' and ':', "
                "starting with a letter or a digit",
            ),
        ]
        | None
    ) = None
    """Name of the model in requests. Left out: the name of this object."""
    engine: Engine = Engine()
    """Settings of the inference engine."""
    accelerator: ModelServeAccelerator = ModelServeAccelerator()
    """The kind of machine to serve on."""
    replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    """Server pods to run; "kubectl scale" sets it too."""


class ServedVersion(Part):
    """One version of the model."""

    version: Annotated[str, Field(max_length=64)] | None = None
    """Version of the FineTune's artifact; none for a model on a claim."""
    digest: Annotated[str, Field(max_length=128)] | None = None
    """Digest of the artifact; none for a model on a claim."""
    claim: Annotated[str, Field(max_length=253)]
    """PersistentVolumeClaim that holds it."""
    path: Annotated[str, Field(max_length=1024)]
    """Directory below the root of the claim."""
    since: Time | None = None
    """When it was first served, or became the candidate."""


class ModelServeStatus(Part):
    """What is served, and what is going on."""

    observed_generation: Annotated[int, Field(ge=0, le=LARGEST_INTEGER)] | None = None
    """Generation (metadata.generation) of the spec that this status tells about."""
    conditions: Conditions = ()
    """Ready: what the spec asks for is served by all replicas. Reconciling: a change is under way. Stalled: only an
    edit helps. Available: at least one replica answers requests."""
    replicas: Count | None = None
    """Server pods that exist."""
    ready_replicas: Count | None = None
    """Server pods that answer requests."""
    selector: Annotated[str, Field(max_length=1024)] | None = None
    """Label selector of the server pods, for what scales them."""
    url: Annotated[str, Field(max_length=1024)] | None = None
    """Base URL of the OpenAI-compatible API inside the cluster."""
    served: ServedVersion | None = None
    """The version that answers requests."""
    candidate: ServedVersion | None = None
    """The version that is being rolled out, until it answers requests on all replicas."""


class ModelServe(Part):
    """A ModelServe serves one model by an OpenAI-compatible endpoint, and rolls out new versions without a failed
    request."""

    rules = (
        Rule(
            rule="self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && "
            f"self.metadata.name.size() <= {NAME_LENGTH}",
            message=f"metadata.name must have at most {NAME_LENGTH} characters: lower-case letters, digits and '-', "
            "starting with a letter and ending with a letter or a digit; a Service gets this name",
        ),
    )

    api_version: Literal["tuneserve.dev/v1alpha1"] = API_VERSION
    kind: Literal["ModelServe"] = "ModelServe"
    metadata: ObjectMeta
    spec: ModelServeSpec
    """What shall be served."""
    status: ModelServeStatus = ModelServeStatus()
    """What is served."""

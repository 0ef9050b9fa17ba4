"""What a stage is told and what it tells: the one module that the control plane and the pipeline share.

It must import neither torch, transformers nor kubernetes: the operator loads it.
A stage is told one `StageConfig` (a JSON file). While it runs it serves Prometheus metrics on `METRICS_PORT`;
at its end it leaves a `Manifest` beside its outputs, an `Outcome` in the termination message, and an `ExitCode`.
"""

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum, StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

METRICS_PORT = 9400
#: Kubernetes cuts a termination message at this size (bytes); a longer one would be unreadable JSON.
OUTCOME_LIMIT = 4096
HASH_LENGTH = 16

CONFIG_PATH = PurePosixPath("/etc/tuneserve/stage/config.json")
ARTIFACTS_PATH = PurePosixPath("/artifacts")
BASE_MODEL_PATH = PurePosixPath("/base-model")
DATASETS_PATH = PurePosixPath("/datasets")
HUB_TOKEN_PATH = PurePosixPath("/etc/tuneserve/hub/token")
TERMINATION_PATH = PurePosixPath("/dev/termination-log")

MANIFEST_NAME = "manifest.json"
#: Where a finished stage keeps what a server or a user loads, below its output directory.
ADAPTER_DIRECTORY = "adapter"
MODEL_DIRECTORY = "model"


class ExitCode(IntEnum):
    """How a stage ends; the Job's `podFailurePolicy` maps each of them."""

    DONE = 0
    INVALID_CONFIG = 64
    """Never retried: the object is Stalled with the reason."""
    INVALID_DATA = 65
    """Never retried: the object is Stalled with the reason."""
    UNAVAILABLE = 69
    """A source could not be reached: retried with backoff."""
    INTERRUPTED = 75
    """Stopped by a signal with a checkpoint saved: resumed, not counted as a failure."""
    OUT_OF_MEMORY = 85
    """The GPU memory did not suffice."""


class StageMetric(StrEnum):
    """Gauges on `METRICS_PORT`; one that the stage has not set is absent."""

    PROGRESS_RATIO = "tuneserve_stage_progress_ratio"
    STEP = "tuneserve_stage_step"
    STEPS = "tuneserve_stage_steps"
    ETA_SECONDS = "tuneserve_stage_eta_seconds"
    LOSS = "tuneserve_stage_loss"
    LEARNING_RATE = "tuneserve_stage_learning_rate"
    GRADIENT_NORM = "tuneserve_stage_gradient_norm"
    TOKENS_PER_SECOND = "tuneserve_stage_tokens_per_second"
    PEAK_GPU_MEMORY_BYTES = "tuneserve_stage_peak_gpu_memory_bytes"


class Part(BaseModel):
    """Base of everything in the contract: immutable, and a field nobody knows is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Variant(Part):
    """One of several forms, told apart by `kind`: written out even where defaults are not, or forms would collide."""

    kind: str

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": self.kind, **handler(self)}


# --- sources ---------------------------------------------------------------------------------------------------------


class LocalModel(Variant):
    """A base model on a claim, mounted read-only at `BASE_MODEL_PATH`."""

    kind: Literal["local"] = "local"
    claim: str
    path: str = ""
    """Below the claim's root."""


class HubModel(Variant):
    """A base model of a Hugging Face-compatible hub; `prepare` stores it below `<artifacts>/base/`."""

    kind: Literal["hub"] = "hub"
    repo: str
    revision: str


BaseModelSource = Annotated[LocalModel | HubModel, Field(discriminator="kind")]


class FileFormat(StrEnum):
    AUTO = "Auto"
    JSONL = "JSONL"
    JSON = "JSON"
    CSV = "CSV"
    PARQUET = "Parquet"


class Source(Variant):
    """Where rows come from, and how many of them count how much."""

    weight: float = 1.0
    """How often each of its training rows is learned from in an epoch: 2 is twice, 0.5 is a random half of them."""
    limit: int | None = None
    """The first so many rows; none: all."""


class ClaimFile(Source):
    """A data file on a claim; `prepare` reads it at `DATASETS_PATH/<claim>/<path>`."""

    kind: Literal["claim"] = "claim"
    claim: str
    path: str
    format: FileFormat = FileFormat.AUTO


class ConfigMapFile(Source):
    """A data file in a ConfigMap, read at `DATASETS_PATH/<split>-<index>/<key>`; its content is part of the hash."""

    kind: Literal["configMap"] = "configMap"
    name: str
    key: str
    digest: str
    """sha256 of the content, in hex: makes an edit of the ConfigMap a new input."""
    format: FileFormat = FileFormat.AUTO


class HubDataset(Source):
    """A split of a data set of a Hugging Face-compatible hub (data files only, never a script)."""

    kind: Literal["hub"] = "hub"
    repo: str
    revision: str
    subset: str = "default"
    split: str = "train"


class HttpFile(Source):
    """A data file fetched over HTTPS, and the sha256 (in hex) that it must have."""

    kind: Literal["http"] = "http"
    url: str
    sha256: str
    format: FileFormat = FileFormat.AUTO


DataSource = Annotated[ClaimFile | ConfigMapFile | HubDataset | HttpFile, Field(discriminator="kind")]


# --- what each stage is told -----------------------------------------------------------------------------------------


class ClassificationTask(Variant):
    """Text to one label out of a closed list, learned as generation of the label."""

    kind: Literal["classification"] = "classification"
    labels: tuple[str, ...]
    instruction: str = ""
    """Sentence before the text; empty asks for one of the labels in plain English."""
    label_values: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Label -> how the data write it, besides its own name."""


class InstructionTask(Variant):
    """Instruction, optional input, and the output to learn."""

    kind: Literal["instruction"] = "instruction"


class CompletionTask(Variant):
    """Prompt and the completion to learn."""

    kind: Literal["completion"] = "completion"


class ConversationTask(Variant):
    """Messages; every answer of the assistant is learned."""

    kind: Literal["conversation"] = "conversation"


class TextTask(Variant):
    """Plain text without a template, all of it learned."""

    kind: Literal["text"] = "text"


class PreferenceTask(Variant):
    """A prompt with a chosen and a rejected answer."""

    kind: Literal["preference"] = "preference"


Task = Annotated[
    ClassificationTask | InstructionTask | CompletionTask | ConversationTask | TextTask | PreferenceTask,
    Field(discriminator="kind"),
]


class TemplateSpec(Part):
    """How a conversation becomes text."""

    inline: str = ""
    """Jinja; empty: the model's own template."""
    system_prompt: str = ""
    """System message of each conversation that has none, in training and in serving alike."""


class Split(Part):
    """Shares of the rows held out when no files are given for them, seeded."""

    validation: float = 0.1
    test: float = 0.1
    seed: int = 42


class PrepareSpec(Variant):
    """Fetch and check the base model and the data, render them as conversations, split them."""

    kind: Literal["prepare"] = "prepare"
    base_model: BaseModelSource
    train: tuple[DataSource, ...]
    validation: tuple[DataSource, ...] = ()
    test: tuple[DataSource, ...] = ()
    split: Split = Split()
    columns: Mapping[str, str] = Field(default_factory=dict)
    """The task's field -> the file's column."""
    task: Task
    template: TemplateSpec = TemplateSpec()
    max_sequence_length: int = 2048
    """Tokens of one row, prompt and completion."""
    revision: str = ""
    """Any string; a new one says that the data changed in place."""


class Scheduler(StrEnum):
    """Course of the learning rate after the warm-up."""

    COSINE = "Cosine"
    COSINE_WITH_MINIMUM = "CosineWithMinimum"
    """Falls to a tenth of the highest rate."""
    LINEAR = "Linear"
    CONSTANT = "Constant"
    INVERSE_SQUARE_ROOT = "InverseSquareRoot"
    WARMUP_STABLE_DECAY = "WarmupStableDecay"
    """Stays, and falls to 0 in the last tenth of the steps."""


class Method(StrEnum):
    """What is trained, and how the base is held."""

    QLORA = "QLoRA"
    LORA = "LoRA"
    FULL = "Full"
    IA3 = "IA3"
    PROMPT_TUNING = "PromptTuning"
    PREFIX_TUNING = "PrefixTuning"


#: Methods that put virtual tokens before each prompt; they change no weight that could be merged.
PROMPT_METHODS = frozenset({Method.PROMPT_TUNING, Method.PREFIX_TUNING})


class Objective(StrEnum):
    SFT = "SFT"
    DPO = "DPO"


class LoraSpec(Part):
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    rank_stabilized: bool = False
    """Whether the scale is alpha / sqrt(rank) instead of alpha / rank."""
    weight_decomposed: bool = False
    """Whether the size of each weight's rows is learned apart from their direction (DoRA)."""
    base_bits: Literal[8, 16] = 16
    """How the base is held while LoRA is trained; QLoRA holds it in 4 bits."""
    target_modules: tuple[str, ...] = ()
    """Empty: all linear layers but the output layer."""


class PromptSpec(Part):
    virtual_tokens: int = 32
    """Learned tokens before each prompt."""


class Packing(StrEnum):
    """Whether rows lie end to end on the device, without padding."""

    AUTO = "Auto"
    """On a GPU, for the models and methods that can be packed."""
    ALWAYS = "Always"
    NEVER = "Never"


class DpoSpec(Part):
    beta: float = 0.1
    """How much a distance from the base model costs."""


class EarlyStopping(Part):
    """Ends a training whose loss on the validation rows has stopped to fall."""

    patience: int
    """Evaluations in a row without an improvement."""
    minimum_improvement: float = 0.0
    """A lower loss counts as an improvement if it is lower by more than this."""


class TrainSpec(Variant):
    """By default QLoRA: a base in NF4 with double quantization, LoRA adapters in 16 bits, loss on the completion."""

    kind: Literal["train"] = "train"
    method: Method = Method.QLORA
    objective: Objective = Objective.SFT
    lora: LoraSpec = LoraSpec()
    prompt: PromptSpec = PromptSpec()
    dpo: DpoSpec = DpoSpec()
    epochs: float | None = None
    max_steps: int | None = None
    """One of `epochs` and `max_steps`; neither: three epochs."""
    learning_rate: float = 2e-4
    scheduler: Scheduler = Scheduler.COSINE
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    global_batch_size: int = 16
    """Rows in one optimizer step, however they are spread over micro-batches."""
    global_batch_tokens: int | None = None
    """Instead: tokens in one optimizer step, as many as whole rows come to, and at least one row."""
    packing: Packing = Packing.AUTO
    max_sequence_length: int = 2048
    seed: int = 42
    neftune_alpha: float = 0.0
    """Scale of the noise on the embeddings while training; 0: none."""
    evaluation_steps: int | None = None
    """Optimizer steps between two losses on the validation rows; the weights with the lowest one are put out.
    None: the weights of the last step are."""
    early_stopping: EarlyStopping | None = None
    """Needs `evaluation_steps`."""


class MergeSpec(Variant):
    """Add the adapter to the original 16-bit base, never to the quantized one."""

    kind: Literal["merge"] = "merge"


class EvaluationTarget(StrEnum):
    BASE = "base"
    ADAPTER = "adapter"
    MERGED = "merged"


class EvaluateSpec(Variant):
    """Generate answers for the test split and score them."""

    kind: Literal["evaluate"] = "evaluate"
    target: EvaluationTarget
    max_samples: int | None = None
    """Rows of the test split; none: all of them."""


StageSpec = Annotated[PrepareSpec | TrainSpec | MergeSpec | EvaluateSpec, Field(discriminator="kind")]


class Checkpoints(Part):
    """What a run can be resumed from."""

    steps: int = 50
    """Optimizer steps between two of them."""
    keep: int = 2
    """Newest ones that stay."""


class Runtime(Part):
    """Where a stage runs. Not part of the input hash: another node or another plan changes no result's identity."""

    device: Literal["cuda", "cpu"] = "cuda"
    micro_batch_size: int | None = None
    """Rows at a time on the device; none: the stage chooses."""
    checkpoints: Checkpoints = Checkpoints()
    hub_endpoint: str | None = None
    """Base URL of the hub; none: the library's default."""


class StageInput(Part):
    """The finished output of a stage before this one."""

    path: str
    """Absolute path of its output directory in the pod."""
    digest: str


class StageConfig(Part):
    """The JSON file that a stage reads."""

    name: str
    """Name in the graph, `evaluate-merged` say; also the name of its directory on the claim."""
    hash: str
    spec: StageSpec
    inputs: Mapping[str, StageInput] = Field(default_factory=dict)
    """By stage name: what `dependencies` of the graph put out."""
    artifacts: str = str(ARTIFACTS_PATH)
    """Root of the artifacts claim."""
    runtime: Runtime = Runtime()

    @property
    def output(self) -> str:
        """Directory of the finished output; the stage writes `<output>.partial` and renames it."""
        return f"{self.artifacts}/{output_path(stage=self.name, hash=self.hash)}"


# --- what each stage tells -------------------------------------------------------------------------------------------


class StageError(Part):
    """Why a stage could not finish: the message names the place (file, line, field) and what to do."""

    reason: str
    """CamelCase, becomes the reason of a condition."""
    message: str


class Outcome(Part):
    """The end of a stage in at most `OUTCOME_LIMIT` bytes, for the termination message."""

    stage: str
    hash: str
    digest: str | None = None
    """Over paths and contents of the output files; none when the stage failed."""
    size_bytes: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = Field(default_factory=dict)
    facts: Mapping[str, str] = Field(default_factory=dict)
    """What was resolved on the way: `revision`, `datasetDigest`, `templateHash`, `rows`, ..."""
    error: StageError | None = None

    def to_message(self) -> str:
        """JSON of at most `OUTCOME_LIMIT` bytes: an error's text is shortened, never the structure."""
        text = self.model_dump_json(exclude_defaults=True)
        excess = len(text.encode()) - OUTCOME_LIMIT
        if excess <= 0:
            return text
        if self.error is None:
            raise ValueError(f"the outcome of {self.stage} has {excess} bytes too many: give fewer metrics and facts")
        # A character may take six bytes as a JSON escape, so cut until it fits.
        message = self.error.message
        while message and len(text.encode()) > OUTCOME_LIMIT:
            message = message[: -max(1, len(message) // 20)]
            error = StageError(reason=self.error.reason, message=message + " …")
            text = self.model_copy(update={"error": error}).model_dump_json(exclude_defaults=True)
        return text


class OutputFile(Part):
    path: str
    """Relative to the output directory, with forward slashes."""
    size: int
    sha256: str


class Manifest(Part):
    """`manifest.json`: everything about one output, written last, before the directory gets its final name."""

    config: StageConfig
    outcome: Outcome
    files: tuple[OutputFile, ...]
    versions: Mapping[str, str]
    """Python package -> version; recorded, never part of the hash."""


# --- identity --------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def input_hash(*, spec: StageSpec, parents: Mapping[str, str], rebuild: str = "") -> str:
    """Identity of a stage's inputs, in hex.

    Only fields that differ from their defaults count, so that a new optional field changes no old hash.
    `parents` are digests of what the stages before it put out; `rebuild` is the user's wish for a new run.
    """
    told: dict[str, Any] = {
        "kind": spec.kind,
        "spec": spec.model_dump(mode="json", exclude_defaults=True),
        "parents": dict(parents),
    }
    if rebuild:
        told["rebuild"] = rebuild
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()[:HASH_LENGTH]


def output_digest(files: tuple[OutputFile, ...]) -> str:
    """Identity of an output: over the sorted paths and contents, not over times or order."""
    listed = sorted((file.path, file.sha256) for file in files)
    return "sha256:" + hashlib.sha256(canonical_json(listed).encode()).hexdigest()


def output_path(*, stage: str, hash: str) -> str:
    """Directory of a finished output below the root of the artifacts claim."""
    return f"{stage}/{hash}"

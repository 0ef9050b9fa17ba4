"""FineTune: a base model, a data set and a method, declared together with the artifacts that shall exist."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from tuneserve.api.dataset import Dataset
from tuneserve.api.finetune_status import FineTuneStatus
from tuneserve.api.meta import (
    API_VERSION,
    INT32_MAX,
    NAME_LENGTH,
    ClaimDirectory,
    DnsLabel,
    HubRepo,
    HubRevision,
    ObjectMeta,
    ObjectName,
    SecretKey,
)
from tuneserve.api.output import Evaluation, Export, ExportFormat, Gate, Output
from tuneserve.api.rules import ListMap, Part, Rule, is_decimal, words
from tuneserve.api.template import Template
from tuneserve.api.training import Dpo, Lora, Prompt, Training
from tuneserve_pipeline.contract import Method, Objective

#: Metrics that the evaluation of a task measures; the first one is the task's main metric. All are shares from 0 to 1.
CLASSIFICATION_METRICS = ("accuracy", "macroF1", "invalidRatio")
INSTRUCTION_METRICS = ("exactMatch",)
TEXT_METRICS = ("tokenAccuracy",)
#: By task: metrics that a gate may name, and fields that a column may be named for.
TASK_METRICS = {
    "classification": CLASSIFICATION_METRICS,
    "instruction": INSTRUCTION_METRICS,
    "completion": INSTRUCTION_METRICS,
    "conversation": INSTRUCTION_METRICS,
    "text": TEXT_METRICS,
    "preference": INSTRUCTION_METRICS,
}
TASK_COLUMNS = {
    "classification": ("text", "label"),
    "instruction": ("instruction", "input", "output"),
    "completion": ("prompt", "completion"),
    "conversation": ("messages",),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}


class HubModel(Part):
    """A base model of a Hugging Face-compatible hub, as safetensors; code of the repository is never run."""

    repo: HubRepo
    """Repository of the model, as owner/name."""
    revision: HubRevision = "main"
    """Commit, tag or branch. A branch or tag is resolved to a commit once, recorded in status.resolved.revision."""


class BaseModelSource(Part):
    """The model to start from."""

    one_of = ("hugging_face", "claim")

    hugging_face: HubModel | None = None
    """A repository of the hub; it is downloaded once, without holding a GPU."""
    claim: ClaimDirectory | None = None
    """A directory on a PersistentVolumeClaim with the model's safetensors, config.json and tokenizer."""
    token_secret: SecretKey | None = None
    """Token for the hub, for models and data sets that are not public. Only the download sees it."""


class LabelValues(Part):
    """How the data write a label."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    """One of the labels."""
    values: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...], Field(min_length=1, max_length=16)
    ]
    """What stands for it in the data, such as "0" or "neg", besides its name."""


class ClassificationTask(Part):
    """Text to one label out of a closed list, learned as generation of the label."""

    rules = (
        Rule(
            rule="!has(self.labelValues) || self.labelValues.all(entry, entry.name in self.labels)",
            message="must name only labels that are in labels",
            field_path=".labelValues",
        ),
    )

    labels: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...],
        Field(min_length=2, max_length=64),
        Rule(
            rule="self.all(label, self.exists_one(other, other == label))",
            message="must not name a label twice",
        ),
        Rule(
            rule="self.all(label, label == label.trim() && !label.contains('\\n'))",
            message="must not have labels with spaces at their ends or line breaks: write the bare word",
        ),
    ]
    """The labels, 2 to 64, each of at most 64 characters. A row with another label is an error."""
    instruction: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Sentence put before each text. Left out: a request, in plain English, to answer with one of the labels."""
    label_values: Annotated[tuple[LabelValues, ...], ListMap("name"), Field(max_length=64)] = ()
    """For data that write labels otherwise, such as numbers: which values stand for which label."""


class InstructionTask(Part):
    """Rows with an instruction, optionally an input, and the output to learn."""


class CompletionTask(Part):
    """Rows with a prompt and the completion to learn."""


class ConversationTask(Part):
    """Rows with messages of a user and an assistant."""


class TextTask(Part):
    """Rows with a text, all of which is learned."""


class PreferenceTask(Part):
    """Rows with a prompt, a chosen and a rejected answer."""


class Task(Part):
    """What the model shall learn; it says which fields the rows have and how they are evaluated. Instruction,
    completion and conversation each also read files in the form of the two others."""

    one_of = tuple(TASK_COLUMNS)

    classification: ClassificationTask | None = None
    """Text to one label. Rows have the fields text and label."""
    instruction: InstructionTask | None = None
    """Instruction to output. Rows have the fields instruction, output, and optionally input. Write "{}"."""
    completion: CompletionTask | None = None
    """Prompt to completion. Rows have the fields prompt and completion. Write "{}"."""
    conversation: ConversationTask | None = None
    """Conversations, in which every answer of the assistant is learned. Rows have the field messages (role, content)
    or conversations (from, value). Write "{}"."""
    text: TextTask | None = None
    """Plain text, learned whole and without a template; a text longer than training.maxSequenceLength is cut into
    pieces. Rows have the field text. Write "{}"."""
    preference: PreferenceTask | None = None
    """Better and worse answers. Rows have the fields prompt, chosen and rejected. Write "{}"."""


class FineTuneAccelerator(Part):
    """The kind of machine to train on."""

    profile: DnsLabel | None = None
    """Name of a profile that the platform offers, such as rtx-4090 or cpu. Left out: the platform's default."""


def _only(*, task: str, path: str, item: str, names: Sequence[str], last: str = "and") -> Rule:
    """Everything at `path` is one of `names` when the task is `task`; `item` is the CEL expression of its name."""
    listed = ", ".join(f"'{name}'" for name in names)
    return Rule(
        rule=f"!has(self.task.{task}) || !has(self.{path}) || self.{path}.all(entry, {item} in [{listed}])",
        message=f"must name only {words(names)} when the task is {task}",
        field_path=f".{path}",
    )


def _format(*, when: str, never: str, message: str) -> Rule:
    """No export has the format `never` when the CEL expression `when` holds."""
    return Rule(
        rule=f"!({when}) || self.exports.all(export, export.format != '{never}')",
        message=message,
        field_path=".exports",
    )


class FineTuneSpec(Part):
    """What shall exist. It may be edited at any time: only the stages that an edit changes run again."""

    rules = (
        *(_only(task=task, path="gates", item="entry.metric", names=names) for task, names in TASK_METRICS.items()),
        *(_only(task=task, path="dataset.columns", item="entry", names=names) for task, names in TASK_COLUMNS.items()),
        _format(
            when="self.method == 'Full'",
            never="Adapter",
            message="must not have the format Adapter with method Full: it changes the model itself; export Merged",
        ),
        _format(
            when="self.method == 'IA3'",
            never="Adapter",
            message="must not have the format Adapter with method IA3: vLLM serves LoRA adapters only; export Merged",
        ),
        _format(
            when="self.lora.weightDecomposed && self.method in ['QLoRA', 'LoRA']",
            never="Adapter",
            message="must not have the format Adapter with lora.weightDecomposed: vLLM serves no DoRA; export Merged",
        ),
        Rule(
            rule="!(self.method in ['PromptTuning', 'PrefixTuning']) || "
            "self.exports.all(export, export.format == 'Adapter')",
            message="must have the format Adapter with PromptTuning and PrefixTuning: learned tokens before the prompt "
            "cannot be merged into the weights",
            field_path=".exports",
        ),
        Rule(
            rule="!has(self.training.neftuneAlpha) || !(self.method in ['PromptTuning', 'PrefixTuning'])",
            message="must be left out with PromptTuning and PrefixTuning: they learn what stands before the embeddings",
            field_path=".training.neftuneAlpha",
        ),
        Rule(
            rule="!has(self.training.neftuneAlpha) || self.objective != 'DPO'",
            message="must be left out with DPO: the base that it compares with would be noisy too",
            field_path=".training.neftuneAlpha",
        ),
        Rule(
            rule="self.training.packing != 'Always' || self.method == 'QLoRA' && self.objective == 'SFT' && "
            "!self.lora.weightDecomposed && !has(self.training.neftuneAlpha) && "
            f"(!{is_decimal('self.lora.dropout')} || double(self.lora.dropout) == 0.0)",
            message="must be Auto or Never unless the method is QLoRA with the objective SFT, without dropout, "
            "weightDecomposed and neftuneAlpha",
            field_path=".training.packing",
        ),
        Rule(
            rule="!has(self.lora.baseBits) || self.method == 'LoRA'",
            message="must be left out unless method is LoRA: QLoRA holds the base in 4 bits, other methods in 16",
            field_path=".lora.baseBits",
        ),
        Rule(
            rule="self.objective != 'DPO' || has(self.task.preference)",
            message="must be SFT unless the task is preference: DPO learns from pairs of answers",
            field_path=".objective",
        ),
        Rule(
            rule="self.objective != 'DPO' || !(self.method in ['PromptTuning', 'PrefixTuning'])",
            message="must be SFT with PromptTuning and PrefixTuning; DPO needs QLoRA, LoRA, Full or IA3",
            field_path=".objective",
        ),
        Rule(
            rule="!has(self.training.evaluationSteps) || has(self.dataset.validation) && "
            f"self.dataset.validation.size() > 0 || !{is_decimal('self.dataset.split.validation')} || "
            "double(self.dataset.split.validation) > 0.0",
            message="must have validation rows to measure the loss on: set dataset.split.validation above 0, give "
            "sources in dataset.validation, or leave evaluationSteps out",
            field_path=".training.evaluationSteps",
        ),
        Rule(
            rule="!has(self.gates) || self.gates.all(gate, !has(gate.export) || "
            "self.exports.exists(export, export.name == gate.export))",
            message="must name, in export, one of the exports, or leave export out to check all of them",
            field_path=".gates",
        ),
    )

    base_model: BaseModelSource
    """The model to start from."""
    dataset: Dataset
    """The rows to learn from and to test on."""
    task: Task
    """What to learn."""
    template: Template = Template()
    """How conversations become the text that the model reads."""
    method: Method = Method.QLORA
    """How to learn it. QLoRA: low-rank adapters on a base that is held in 4 bits; LoRA: on one in 16 or 8 bits. Full:
    all weights. IA3: a factor for each key, value and feed-forward channel. PromptTuning, PrefixTuning: learned tokens
    before each prompt, which only the export Adapter holds."""
    objective: Objective = Objective.SFT
    """What to learn from. SFT: the answers; DPO: which of two answers is the better one, of the task preference."""
    dpo: Dpo = Dpo()
    """How the objective DPO weighs what it learns."""
    lora: Lora = Lora()
    """Size and place of the adapters of QLoRA and LoRA."""
    prompt: Prompt = Prompt()
    """What PromptTuning and PrefixTuning put before each prompt."""
    training: Training = Training()
    """Length and speed of the training."""
    accelerator: FineTuneAccelerator = FineTuneAccelerator()
    """The kind of machine to train on."""
    exports: Annotated[
        tuple[Export, ...],
        ListMap("name"),
        Field(min_length=1, max_length=16),
        Rule(
            rule="self.all(export, self.exists_one(other, other.format == export.format))",
            message="must have each format once: two exports of one format would be the same artifact",
        ),
    ] = (Export(name="merged", format=ExportFormat.MERGED),)
    """The artifacts that shall exist; each is measured on the test rows, beside the base model."""
    evaluation: Evaluation = Evaluation()
    """How the exports are measured."""
    gates: Annotated[tuple[Gate, ...], Field(max_length=16)] = ()
    """What an export must reach to be served. Left out: every export passes."""
    output: Output = Output()
    """Where the artifacts are kept."""
    suspend: bool = False
    """Whether to stop: running stages end with a checkpoint and go on from it when this is false again."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods of all stages."""
    deadline_seconds: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    """Seconds that one stage may take, all its attempts together. Left out: no limit."""
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """How often a failed stage is tried again, 0 to 20. Errors in the configuration or the data are not tried again;
    evictions and preemptions do not count."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=INT32_MAX)] = 86_400
    """Seconds after which the Job and the pods of a finished stage are removed. Artifacts stay."""


class FineTune(Part):
    """A FineTune declares artifacts: a base model, tuned on a data set, exported, and measured. The operator runs the
    stages that are missing, one Job each, and keeps their outputs on a claim."""

    rules = (
        Rule(
            rule=f"self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && "
            f"self.metadata.name.size() <= {NAME_LENGTH}",
            message=f"metadata.name must have at most {NAME_LENGTH} characters: lower-case letters, digits and '-', "
            "starting and ending with a letter or a digit",
        ),
    )

    api_version: Literal["tuneserve.dev/v1alpha1"] = API_VERSION
    kind: Literal["FineTune"] = "FineTune"
    metadata: ObjectMeta
    spec: FineTuneSpec
    """What shall exist."""
    status: FineTuneStatus = FineTuneStatus()
    """What exists."""

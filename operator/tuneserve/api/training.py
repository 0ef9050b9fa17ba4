"""How a FineTune learns: the method, the size of the adapters, and the course of the training."""

from typing import Annotated

from pydantic import Field

from tuneserve.api.meta import INT32_MAX, DecimalString
from tuneserve.api.rules import Part, Rule, decimal
from tuneserve_pipeline.contract import Packing, Scheduler


class Lora(Part):
    """Size and place of the low-rank adapters of the methods QLoRA and LoRA."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank of the adapters, 1 to 512, the largest that is served. A higher rank learns more and needs more memory."""
    alpha: Annotated[int, Field(ge=1, le=1024)] = 32
    """Scale of the adapters: they are multiplied by alpha / rank, or alpha / sqrt(rank) with rankStabilized."""
    rank_stabilized: bool = False
    """Whether to divide by the square root of the rank (rsLoRA), which makes high ranks learn more."""
    weight_decomposed: bool = False
    """Whether to learn the size of each weight's rows apart from their direction (DoRA). Such an adapter can be merged,
    but not be served beside its base."""
    base_bits: (
        Annotated[int, Field(ge=8, le=16), Rule(rule="self == 8 || self == 16", message="must be 8 or 16")] | None
    ) = None
    """Bits in which method LoRA holds the base: 16 is exact, 8 takes half the memory. Left out: 16. QLoRA has 4."""
    dropout: Annotated[DecimalString, decimal(at_least=0, below=1, example="0.05")] = "0"
    """Share of the adapters' inputs dropped at random while training, from 0 to below 1."""
    target_modules: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128)], ...],
        Field(max_length=32),
        Rule(
            rule="self.all(module, module.matches('^[A-Za-z0-9_.]+$'))",
            message="must be names of modules such as q_proj: letters, digits, '_' and '.'",
        ),
        Rule(
            rule="self.all(module, module != 'lm_head' && !module.endsWith('.lm_head'))",
            message="must not name lm_head: an adapter on the output layer cannot be trained; name other linear layers",
        ),
    ] = ()
    """Names of the linear layers that get an adapter, such as q_proj. Left out: all but the output layer."""


class Prompt(Part):
    """What the methods PromptTuning and PrefixTuning put before each prompt."""

    virtual_tokens: Annotated[int, Field(ge=1, le=512)] = 32
    """Learned tokens before each prompt, 1 to 512; they take part of the model's context."""


class Dpo(Part):
    """How the objective DPO weighs what it learns."""

    beta: Annotated[DecimalString, decimal(above=0, at_most=10, example="0.1")] = "0.1"
    """What a distance from the base model costs, above 0 and at most 10: the lower, the further it may go."""


class EarlyStopping(Part):
    """Ends a training whose loss on the validation rows has stopped to fall."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Measurements in a row, evaluationSteps apart, without an improvement after which the training ends."""
    minimum_improvement: Annotated[DecimalString, decimal(at_least=0, at_most=100, example="0.001")] = "0"
    """By how much more than this the loss must fall to count as an improvement."""


class Checkpoints(Part):
    """How often the training can be resumed from. An edit does not train again: it counts from the next start on."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = 50
    """Optimizer steps between two checkpoints. An interrupted training loses at most that many."""
    keep: Annotated[int, Field(ge=1, le=10)] = 2
    """Checkpoints kept on the claim, the latest ones, 1 to 10. They are removed when the training is finished."""


class Training(Part):
    """How long and how fast the model learns."""

    rules = (
        Rule(
            rule="!(has(self.epochs) && has(self.maxSteps))",
            message="must set at most one of epochs and maxSteps",
        ),
        Rule(
            rule="!(has(self.globalBatchSize) && has(self.globalBatchTokens))",
            message="must set at most one of globalBatchSize and globalBatchTokens",
        ),
        Rule(
            rule="!has(self.earlyStopping) || has(self.evaluationSteps)",
            message="must set evaluationSteps with earlyStopping: how often the loss is measured that shall fall",
            field_path=".earlyStopping",
        ),
    )

    epochs: Annotated[DecimalString, decimal(above=0, at_most=1000, example="3")] | None = None
    """Passes over the training rows, as a decimal number in quotes. With neither epochs nor maxSteps: "3"."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps to train for, instead of epochs."""
    learning_rate: Annotated[DecimalString, decimal(above=0, at_most=1, example="2e-4")] | None = None
    """Highest learning rate, as a decimal number in quotes, greater than 0 and at most 1. Left out: "2e-4" for QLoRA
    and LoRA, "2e-5" for Full, "3e-3" for IA3, "3e-2" for PromptTuning and PrefixTuning; a twentieth of it with the
    objective DPO."""
    scheduler: Scheduler = Scheduler.COSINE
    """Course of the learning rate after the warm-up: Cosine and Linear fall to 0, CosineWithMinimum to a tenth;
    Constant stays; InverseSquareRoot falls ever more slowly; WarmupStableDecay stays, and falls to 0 in the last tenth
    of the steps."""
    warmup: Annotated[DecimalString, decimal(at_least=0, below=1, example="0.03")] = "0.03"
    """Share of the steps, from 0 to below 1, in which the learning rate rises from 0."""
    weight_decay: Annotated[DecimalString, decimal(at_least=0, at_most=1, example="0.01")] = "0"
    """Decay of the trained weights in each step, from 0 to 1."""
    max_gradient_norm: Annotated[DecimalString, decimal(above=0, at_most=1000, example="1.0")] = "1.0"
    """Norm to which longer gradients are cut."""
    global_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Rows in one optimizer step, however many of them fit the memory of the GPU at a time. Left out, without
    globalBatchTokens: 16."""
    global_batch_tokens: Annotated[int, Field(ge=16, le=16_777_216)] | None = None
    """Tokens in one optimizer step instead of rows: about as many in each, and at least one row. Better where rows
    are of very different lengths."""
    max_sequence_length: Annotated[int, Field(ge=16, le=131_072)] = 2048
    """Longest row in tokens, prompt and answer together."""
    packing: Packing = Packing.AUTO
    """Whether rows lie end to end on the device, without padding, which is several times as fast. Auto: on a GPU, for
    QLoRA on all linear layers of Llama, Mistral and Qwen models; Always: or the run is refused; Never."""
    neftune_alpha: Annotated[DecimalString, decimal(above=0, at_most=100, example="5")] | None = None
    """Scale of the random noise that is added to the embeddings while training (NEFTune). Left out: none."""
    seed: Annotated[int, Field(ge=0, le=INT32_MAX)] = 42
    """Seed of the adapters' first weights and of the order of the rows."""
    evaluation_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps between two measurements of the loss on the validation rows; the weights with the lowest loss
    are put out. Left out: it is measured at the end only, and the weights of the last step are put out."""
    early_stopping: EarlyStopping | None = None
    """When to end before the last step. Left out: never."""
    checkpoints: Checkpoints = Checkpoints()
    """When checkpoints are written and how many stay."""

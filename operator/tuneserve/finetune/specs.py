"""What each stage is told, derived from the spec of the FineTune: only fields that reach a stage, so that an edit
re-runs only what it changes. Pure.
"""

from collections.abc import Iterable, Mapping

from tuneserve import api
from tuneserve.finetune.graph import Stage, StageKind
from tuneserve_pipeline import contract

#: (ConfigMap, key) -> sha256 of the content, in hex.
Digests = Mapping[tuple[str, str], str]

LORA_METHODS = frozenset({contract.Method.QLORA, contract.Method.LORA})
#: Rows in a step when neither rows nor tokens are given.
GLOBAL_BATCH_SIZE = 16
#: What is learned well without being asked, as the field's description says.
LEARNING_RATES = {
    contract.Method.QLORA: 2e-4,
    contract.Method.LORA: 2e-4,
    contract.Method.FULL: 2e-5,
    contract.Method.IA3: 3e-3,
    contract.Method.PROMPT_TUNING: 3e-2,
    contract.Method.PREFIX_TUNING: 3e-2,
}


#: DPO starts from a model that answers already, and a rate that teaches one to answer would unlearn it.
DPO_RATE_SHARE = 0.05


def stage_spec(stage: Stage, spec: api.FineTuneSpec, *, digests: Digests) -> contract.StageSpec:
    """The contract's spec of a stage.

    `digests` must have every ConfigMap key of the data set when the stage is `prepare`; raises KeyError otherwise.
    """
    if stage.kind is StageKind.PREPARE:
        return _prepare(spec, digests)
    if stage.kind is StageKind.TRAIN:
        return _train(spec)
    if stage.kind is StageKind.MERGE:
        return contract.MergeSpec()
    if stage.target is None:
        raise ValueError(f"stage {stage.name} says not what it evaluates")
    return contract.EvaluateSpec(target=stage.target, max_samples=spec.evaluation.max_samples)


def _prepare(spec: api.FineTuneSpec, digests: Digests) -> contract.PrepareSpec:
    data = spec.dataset
    return contract.PrepareSpec(
        base_model=_base_model(spec.base_model),
        train=_sources(data.train, digests),
        validation=_sources(data.validation, digests),
        test=_sources(data.test, digests),
        split=contract.Split(
            validation=float(data.split.validation), test=float(data.split.test), seed=data.split.seed
        ),
        columns=data.columns,
        task=_task(spec.task),
        template=contract.TemplateSpec(
            inline=spec.template.inline or "", system_prompt=spec.template.system_prompt or ""
        ),
        max_sequence_length=spec.training.max_sequence_length,
        revision=data.revision or "",
    )


def _base_model(source: api.BaseModelSource) -> contract.BaseModelSource:
    if source.hugging_face is not None:
        return contract.HubModel(repo=source.hugging_face.repo, revision=source.hugging_face.revision)
    assert source.claim is not None  # exactly one is set, which parsing has checked
    return contract.LocalModel(claim=source.claim.name, path=source.claim.path)


def _sources(sources: Iterable[api.DataSource], digests: Digests) -> tuple[contract.DataSource, ...]:
    return tuple(_source(source, digests) for source in sources)


def _source(source: api.DataSource, digests: Digests) -> contract.DataSource:
    format = contract.FileFormat(source.format.value)
    weight, limit = float(source.weight), source.limit
    if source.claim is not None:
        claim = source.claim
        return contract.ClaimFile(claim=claim.name, path=claim.path, format=format, weight=weight, limit=limit)
    if source.config_map is not None:
        name, key = source.config_map.name, source.config_map.key
        return contract.ConfigMapFile(
            name=name, key=key, digest=digests[name, key], format=format, weight=weight, limit=limit
        )
    if source.http is not None:
        http = source.http
        return contract.HttpFile(url=http.url, sha256=http.sha256, format=format, weight=weight, limit=limit)
    assert source.hugging_face is not None
    hub = source.hugging_face
    return contract.HubDataset(
        repo=hub.repo, revision=hub.revision, subset=hub.subset, split=hub.split, weight=weight, limit=limit
    )


def _task(task: api.Task) -> contract.Task:
    if task.classification is not None:
        return contract.ClassificationTask(
            labels=task.classification.labels,
            instruction=task.classification.instruction or "",
            label_values={entry.name: entry.values for entry in task.classification.label_values},
        )
    if task.completion is not None:
        return contract.CompletionTask()
    if task.conversation is not None:
        return contract.ConversationTask()
    if task.text is not None:
        return contract.TextTask()
    if task.preference is not None:
        return contract.PreferenceTask()
    return contract.InstructionTask()


def _train(spec: api.FineTuneSpec) -> contract.TrainSpec:
    training = spec.training
    return contract.TrainSpec(
        method=spec.method,
        objective=spec.objective,
        dpo=contract.DpoSpec(beta=float(spec.dpo.beta))
        if spec.objective is contract.Objective.DPO
        else contract.DpoSpec(),
        lora=_lora(spec.lora) if spec.method in LORA_METHODS else contract.LoraSpec(),
        prompt=contract.PromptSpec(virtual_tokens=spec.prompt.virtual_tokens)
        if spec.method in contract.PROMPT_METHODS
        else contract.PromptSpec(),
        epochs=None if training.epochs is None else float(training.epochs),
        max_steps=training.max_steps,
        learning_rate=_learning_rate(spec),
        scheduler=training.scheduler,
        warmup_ratio=float(training.warmup),
        weight_decay=float(training.weight_decay),
        max_gradient_norm=float(training.max_gradient_norm),
        global_batch_size=training.global_batch_size or GLOBAL_BATCH_SIZE,
        global_batch_tokens=training.global_batch_tokens,
        max_sequence_length=training.max_sequence_length,
        seed=training.seed,
        packing=training.packing,
        neftune_alpha=float(training.neftune_alpha or 0),
        evaluation_steps=training.evaluation_steps,
        early_stopping=_early_stopping(training.early_stopping),
    )


def _learning_rate(spec: api.FineTuneSpec) -> float:
    if spec.training.learning_rate is not None:
        return float(spec.training.learning_rate)
    usual = LEARNING_RATES[spec.method]
    return usual * DPO_RATE_SHARE if spec.objective is contract.Objective.DPO else usual


def _lora(given: api.Lora) -> contract.LoraSpec:
    return contract.LoraSpec(
        rank=given.rank,
        alpha=given.alpha,
        dropout=float(given.dropout),
        rank_stabilized=given.rank_stabilized,
        weight_decomposed=given.weight_decomposed,
        base_bits=8 if given.base_bits == 8 else 16,
        target_modules=given.target_modules,
    )


def _early_stopping(given: api.EarlyStopping | None) -> contract.EarlyStopping | None:
    if given is None:
        return None
    return contract.EarlyStopping(patience=given.patience, minimum_improvement=float(given.minimum_improvement))

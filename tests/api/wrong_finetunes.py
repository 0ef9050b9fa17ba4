"""FineTunes that users get wrong."""

from collections.abc import Mapping
from typing import Any

from api.manifests import FINETUNE, INSTRUCTION, REMOVED, Object
from api.wrong import LABEL, METADATA, NAME, PATH, Wrong, WrongEdit

_CLAIM = {"name": "data", "path": "train.jsonl"}
_REPO = "must be a repository of the hub, written as owner/name without a URL"
_TASKS = "must set exactly one of classification, instruction, completion, conversation, text and preference"
_URL = "must be an address such as https://data.example/rows.jsonl: https, without a user or a password"
_SHA256 = "0123456789abcdef" * 4
_RATIO = 'must be a decimal number in quotes, at least 0 and at most 1, such as "0.80"; write 80 % as "0.80"'


_ADAPTER = [{"name": "adapter", "format": "Adapter"}]


def _finetune(name: str, changes: Mapping[str, Any], place: str, sentence: str) -> Wrong:
    return Wrong(name=name, changes=changes, place=place, sentence=sentence, original=FINETUNE)


def _source(**source: Any) -> Object:
    return {"spec.dataset.train": [source]}


FINETUNES = (
    # Names and shape
    _finetune("name with dots", {"metadata.name": "my.model"}, "<nil>", f"{METADATA} and ending with a letter"),
    _finetune("name too long", {"metadata.name": "x" * 64}, "<nil>", f"{METADATA} and ending with a letter"),
    _finetune("no base model", {"spec.baseModel": REMOVED}, "spec.baseModel", "Required value"),
    _finetune("no data", {"spec.dataset": REMOVED}, "spec.dataset", "Required value"),
    _finetune("no task", {"spec.task": REMOVED}, "spec.task", "Required value"),
    _finetune("a mistyped field", {"spec.trainig": {"maxSteps": 3}}, "spec.trainig", "unknown field"),
    _finetune("a field in the wrong place", {"spec.epochs": "3"}, "spec.epochs", "unknown field"),
    # Base model
    _finetune(
        "no form of base model",
        {"spec.baseModel": {}},
        "spec.baseModel",
        "must set exactly one of huggingFace and claim",
    ),
    _finetune(
        "both forms of base model",
        {"spec.baseModel.huggingFace": {"repo": "org/model"}},
        "spec.baseModel",
        "must set exactly one of huggingFace and claim",
    ),
    _finetune(
        "repo as a URL",
        {"spec.baseModel": {"huggingFace": {"repo": "https://hub.example/org/model"}}},
        "spec.baseModel.huggingFace.repo",
        _REPO,
    ),
    _finetune(
        "repo that leaves its place", {"spec.baseModel": {"huggingFace": {"repo": "../etc"}}}, "huggingFace.repo", _REPO
    ),
    _finetune(
        "revision with a space",
        {"spec.baseModel": {"huggingFace": {"repo": "org/model", "revision": "my branch"}}},
        "spec.baseModel.huggingFace.revision",
        "must be a commit, a tag or a branch: letters, digits, '-', '_', '.' and '/'",
    ),
    _finetune("claim with capitals", {"spec.baseModel.claim.name": "Models"}, "spec.baseModel.claim.name", NAME),
    _finetune("absolute path", {"spec.baseModel.claim.path": "/models"}, "spec.baseModel.claim.path", PATH),
    _finetune("path that climbs", {"spec.baseModel.claim.path": "a/../../b"}, "spec.baseModel.claim.path", PATH),
    _finetune(
        "secret key with a slash",
        {"spec.baseModel.tokenSecret": {"name": "hub", "key": "a/b"}},
        "spec.baseModel.tokenSecret.key",
        "must be a key of its data: letters, digits, '-', '_' and '.'",
    ),
    # Data
    _finetune("no source", {"spec.dataset.train": []}, "spec.dataset.train", "should have at least 1 items"),
    _finetune("17 sources", {"spec.dataset.train": [{"claim": _CLAIM}] * 17}, "spec.dataset.train", "at most 16 items"),
    _finetune(
        "an empty source",
        {"spec.dataset.train": [{}]},
        "spec.dataset.train[0]",
        "must set exactly one of claim, configMap, huggingFace and http",
    ),
    _finetune(
        "a source in two forms",
        _source(claim=_CLAIM, configMap={"name": "rows", "key": "a.jsonl"}),
        "spec.dataset.train[0]",
        "must set exactly one of claim, configMap, huggingFace and http",
    ),
    _finetune("a file without a path", _source(claim={"name": "data"}), "train[0].claim.path", "Required value"),
    _finetune(
        "a format that nobody reads", _source(claim=_CLAIM, format="XLSX"), "train[0].format", '"CSV", "Parquet"'
    ),
    _finetune(
        "a format for the hub",
        _source(huggingFace={"repo": "org/data"}, format="CSV"),
        "spec.dataset.train[0].format",
        "must be left out, or Auto, with huggingFace: the hub says in what format its files are",
    ),
    _finetune("a share that is a word", {"spec.dataset.split": {"test": "half"}}, "split.test", 'such as "0.1"'),
    _finetune(
        "a share in percent",
        {"spec.dataset.split": {"validation": "10"}},
        "spec.dataset.split.validation",
        'must be a decimal number in quotes, at least 0 and less than 1, such as "0.1"',
    ),
    _finetune("a share without quotes", {"spec.dataset.split": {"test": 0.1}}, "split.test", "must be of type string"),
    _finetune(
        "nothing left to train on",
        {"spec.dataset.split": {"validation": "0.5", "test": "0.5"}},
        "spec.dataset.split",
        "must leave rows to train on: make validation and test together less than 1",
    ),
    _finetune(
        "nothing to test on",
        {"spec.dataset.split": {"test": "0"}},
        "spec.dataset.split.test",
        "must hold out rows for the test: set split.test above 0, or give sources in test",
    ),
    _finetune(
        "no sources to test on",
        {"spec.dataset.test": [], "spec.dataset.split": {"test": "0"}},
        "spec.dataset.split.test",
        "must hold out rows for the test: set split.test above 0, or give sources in test",
    ),
    _finetune(
        "a column for a field of another task",
        {"spec.dataset.columns": {"prompt": "tweet"}},
        "spec.dataset.columns",
        "must name only text and label when the task is classification",
    ),
    _finetune(
        "a column for a field of no instruction",
        {**INSTRUCTION, "spec.dataset.columns": {"text": "tweet"}},
        "spec.dataset.columns",
        "must name only instruction, input and output when the task is instruction",
    ),
    _finetune(
        "a column for a field of no completion",
        {"spec.task": {"completion": {}}, "spec.dataset.columns": {"output": "answer"}},
        "spec.dataset.columns",
        "must name only prompt and completion when the task is completion",
    ),
    _finetune(
        "a column for a field of no conversation",
        {"spec.task": {"conversation": {}}, "spec.dataset.columns": {"text": "dialog"}},
        "spec.dataset.columns",
        "must name only messages when the task is conversation",
    ),
    _finetune(
        "a column for a field of no text",
        {"spec.task": {"text": {}}, "spec.dataset.columns": {"prompt": "body"}},
        "spec.dataset.columns",
        "must name only text when the task is text",
    ),
    _finetune(
        "a column for a field of no preference",
        {"spec.task": {"preference": {}}, "spec.dataset.columns": {"answer": "good"}},
        "spec.dataset.columns",
        "must name only prompt, chosen and rejected when the task is preference",
    ),
    *(
        _finetune(f"{name} address", _source(http={"url": url, "sha256": _SHA256}), "train[0].http.url", _URL)
        for name, url in (
            ("a plain http", "http://data.example/rows.jsonl"),
            ("a file", "file:///etc/passwd"),
            ("a password in the", "https://me:secret@data.example/rows.jsonl"),
        )
    ),
    _finetune(
        "a file at an address without its sha256",
        _source(http={"url": "https://data.example/rows.jsonl"}),
        "train[0].http.sha256",
        "Required value",
    ),
    _finetune(
        "a sha256 of another length",
        _source(http={"url": "https://data.example/rows.jsonl", "sha256": "sha256:0123"}),
        "train[0].http.sha256",
        "must be the sha256 of the file, 64 digits from 0 to 9 and a to f, as sha256sum prints it",
    ),
    _finetune(
        "a source of no weight",
        _source(claim=_CLAIM, weight="0"),
        "train[0].weight",
        'must be a decimal number in quotes, greater than 0 and at most 100, such as "0.5"',
    ),
    *(
        _finetune(
            f"a weight for the {split}",
            {f"spec.dataset.{split}": [{"claim": _CLAIM, "weight": "2"}]},
            f"spec.dataset.{split}",
            "must not weigh rows that are not trained on: leave weight out",
        )
        for split in ("validation", "test")
    ),
    _finetune("no rows of a source", _source(claim=_CLAIM, limit=0), "train[0].limit", "greater than or equal to 1"),
    # Template
    _finetune(
        "a template of another source",
        {"spec.template": {"inline": "{{ messages }}"}},
        "spec.template",
        "must have inline, a Jinja template, if and only if source is Inline",
    ),
    _finetune(
        "an inline template that is not there",
        {"spec.template": {"source": "Inline"}},
        "spec.template",
        "must have inline, a Jinja template, if and only if source is Inline",
    ),
    _finetune(
        "a template of nowhere", {"spec.template": {"source": "Default"}}, "template.source", '"Model", "Inline"'
    ),
    _finetune(
        "a template as long as a book",
        {"spec.template": {"source": "Inline", "inline": "x" * 16_385}},
        "spec.template.inline",
        "may not be more than 16384",
    ),
    _finetune(
        "an endless system prompt",
        {"spec.template": {"systemPrompt": "x" * 8193}},
        "spec.template.systemPrompt",
        "may not be more than 8192",
    ),
    # Task
    _finetune("no form of task", {"spec.task": {}}, "spec.task", _TASKS),
    _finetune(
        "two tasks",
        {"spec.task.instruction": {}},
        "spec.task",
        _TASKS,
    ),
    _finetune("one label", {"spec.task.classification.labels": ["a"]}, "classification.labels", "at least 2 items"),
    _finetune(
        "65 labels",
        {"spec.task.classification.labels": [f"label{i}" for i in range(65)]},
        "classification.labels",
        "at most 64 items",
    ),
    _finetune("an empty label", {"spec.task.classification.labels": ["a", ""]}, "labels[1]", "at least 1 chars long"),
    _finetune(
        "a long label", {"spec.task.classification.labels": ["a", "b" * 65]}, "labels[1]", "may not be more than 64"
    ),
    _finetune(
        "a label twice", {"spec.task.classification.labels": ["a", "b", "a"]}, "labels", "must not name a label twice"
    ),
    _finetune(
        "a label with a space",
        {"spec.task.classification.labels": ["a", "b "]},
        "labels",
        "must not have labels with spaces at their ends or line breaks: write the bare word",
    ),
    _finetune(
        "values of a label that is none",
        {"spec.task.classification": {"labels": ["a", "b"], "labelValues": [{"name": "c", "values": ["0"]}]}},
        "spec.task.classification.labelValues",
        "must name only labels that are in labels",
    ),
    _finetune(
        "values of a label twice",
        {
            "spec.task.classification": {
                "labels": ["a", "b"],
                "labelValues": [{"name": "a", "values": ["0"]}, {"name": "a", "values": ["1"]}],
            }
        },
        "spec.task.classification.labelValues[1]",
        "Duplicate value",
    ),
    _finetune(
        "a label without values",
        {"spec.task.classification": {"labels": ["a", "b"], "labelValues": [{"name": "a", "values": []}]}},
        "labelValues[0].values",
        "at least 1 items",
    ),
    # Method and training
    _finetune("an unknown method", {"spec.method": "lora"}, "spec.method", 'supported values: "QLoRA", "LoRA", "Full"'),
    _finetune(
        "an adapter of a full training",
        {"spec.method": "Full", "spec.exports": _ADAPTER},
        "spec.exports",
        "must not have the format Adapter with method Full: it changes the model itself; export Merged",
    ),
    _finetune(
        "an adapter of IA3",
        {"spec.method": "IA3", "spec.exports": _ADAPTER},
        "spec.exports",
        "must not have the format Adapter with method IA3: vLLM serves LoRA adapters only; export Merged",
    ),
    _finetune(
        "a DoRA adapter",
        {"spec.lora": {"weightDecomposed": True}, "spec.exports": _ADAPTER},
        "spec.exports",
        "must not have the format Adapter with lora.weightDecomposed: vLLM serves no DoRA; export Merged",
    ),
    _finetune(
        "DPO without pairs",
        {"spec.objective": "DPO"},
        "spec.objective",
        "must be SFT unless the task is preference: DPO learns from pairs of answers",
    ),
    _finetune(
        "DPO of a learned prompt",
        {
            "spec.objective": "DPO",
            "spec.task": {"preference": {}},
            "spec.method": "PromptTuning",
            "spec.exports": _ADAPTER,
        },
        "spec.objective",
        "must be SFT with PromptTuning and PrefixTuning; DPO needs QLoRA, LoRA, Full or IA3",
    ),
    _finetune(
        "no such objective",
        {"spec.objective": "PPO"},
        "spec.objective",
        'supported values: "SFT", "DPO"',
    ),
    _finetune(
        "a distance that costs nothing",
        {"spec.dpo": {"beta": "0"}},
        "spec.dpo.beta",
        'must be a decimal number in quotes, greater than 0 and at most 10, such as "0.1"',
    ),
    _finetune(
        "noise beside a comparison",
        {"spec.objective": "DPO", "spec.task": {"preference": {}}, "spec.training": {"neftuneAlpha": "5"}},
        "spec.training.neftuneAlpha",
        "must be left out with DPO: the base that it compares with would be noisy too",
    ),
    _finetune(
        "packing where it cannot be",
        {"spec.lora": {"dropout": "0.1"}, "spec.training": {"packing": "Always"}},
        "spec.training.packing",
        "must be Auto or Never unless the method is QLoRA with the objective SFT, without dropout",
    ),
    _finetune(
        "no such packing",
        {"spec.training": {"packing": "Sometimes"}},
        "spec.training.packing",
        'supported values: "Auto", "Always", "Never"',
    ),
    _finetune(
        "a learned prompt merged",
        {"spec.method": "PromptTuning"},
        "spec.exports",
        "must have the format Adapter with PromptTuning and PrefixTuning: learned tokens before the prompt cannot be "
        "merged into the weights",
    ),
    _finetune(
        "a learned prefix merged",
        {"spec.method": "PrefixTuning", "spec.exports": [*_ADAPTER, {"name": "merged", "format": "Merged"}]},
        "spec.exports",
        "must have the format Adapter with PromptTuning and PrefixTuning: learned tokens before the prompt cannot be "
        "merged into the weights",
    ),
    _finetune(
        "a prompt longer than any model's",
        {"spec.method": "PromptTuning", "spec.exports": _ADAPTER, "spec.prompt": {"virtualTokens": 1000}},
        "spec.prompt.virtualTokens",
        "should be less than or equal to 512",
    ),
    _finetune(
        "bits of QLoRA",
        {"spec.lora": {"baseBits": 8}},
        "spec.lora.baseBits",
        "must be left out unless method is LoRA: QLoRA holds the base in 4 bits, other methods in 16",
    ),
    _finetune(
        "bits that no base has",
        {"spec.method": "LoRA", "spec.lora": {"baseBits": 12}},
        "spec.lora.baseBits",
        "must be 8 or 16",
    ),
    _finetune("a rank nobody serves", {"spec.lora": {"rank": 1024}}, "spec.lora.rank", "less than or equal to 512"),
    _finetune("rank 0", {"spec.lora": {"rank": 0}}, "spec.lora.rank", "should be greater than or equal to 1"),
    _finetune("dropout of all", {"spec.lora": {"dropout": "1"}}, "spec.lora.dropout", 'less than 1, such as "0.05"'),
    _finetune(
        "an adapter on the output layer",
        {"spec.lora": {"targetModules": ["q_proj", "lm_head"]}},
        "spec.lora.targetModules",
        "must not name lm_head: an adapter on the output layer cannot be trained; name other linear layers",
    ),
    _finetune(
        "modules as an expression",
        {"spec.lora": {"targetModules": ["*.q_proj"]}},
        "spec.lora.targetModules",
        "must be names of modules such as q_proj: letters, digits, '_' and '.'",
    ),
    _finetune(
        "epochs and steps",
        {"spec.training": {"epochs": "3", "maxSteps": 100}},
        "spec.training",
        "must set at most one of epochs and maxSteps",
    ),
    _finetune(
        "no epochs at all",
        {"spec.training": {"epochs": "0"}},
        "spec.training.epochs",
        'must be a decimal number in quotes, greater than 0 and at most 1000, such as "3"',
    ),
    _finetune("no steps at all", {"spec.training": {"maxSteps": 0}}, "training.maxSteps", "greater than or equal to 1"),
    _finetune(
        "a learning rate that diverges",
        {"spec.training": {"learningRate": "2"}},
        "spec.training.learningRate",
        'must be a decimal number in quotes, greater than 0 and at most 1, such as "2e-4"',
    ),
    _finetune(
        "a learning rate without quotes",
        {"spec.training": {"learningRate": 0.0002}},
        "spec.training.learningRate",
        "must be of type string",
    ),
    _finetune(
        "a negative learning rate",
        {"spec.training": {"learningRate": "-1e-4"}},
        "spec.training.learningRate",
        'must be a decimal number in quotes, greater than 0 and at most 1, such as "2e-4"',
    ),
    _finetune(
        "a scheduler in small letters", {"spec.training": {"scheduler": "cosine"}}, "scheduler", '"CosineWithMinimum"'
    ),
    _finetune(
        "warm-up in steps", {"spec.training": {"warmup": "100"}}, "training.warmup", 'less than 1, such as "0.03"'
    ),
    _finetune(
        "weight decay in percent", {"spec.training": {"weightDecay": "5"}}, "training.weightDecay", 'such as "0.01"'
    ),
    _finetune(
        "a gradient norm of 0",
        {"spec.training": {"maxGradientNorm": "0"}},
        "training.maxGradientNorm",
        'greater than 0 and at most 1000, such as "1.0"',
    ),
    _finetune(
        "rows longer than any model takes",
        {"spec.training": {"maxSequenceLength": 1_000_000}},
        "training.maxSequenceLength",
        "should be less than or equal to 131072",
    ),
    _finetune(
        "a batch in rows and in tokens",
        {"spec.training": {"globalBatchSize": 8, "globalBatchTokens": 8192}},
        "spec.training",
        "must set at most one of globalBatchSize and globalBatchTokens",
    ),
    _finetune(
        "a batch of hardly a word",
        {"spec.training": {"globalBatchTokens": 2}},
        "spec.training.globalBatchTokens",
        "greater than or equal to 16",
    ),
    _finetune(
        "early stopping without a measurement",
        {"spec.training": {"earlyStopping": {"patience": 2}}},
        "spec.training.earlyStopping",
        "must set evaluationSteps with earlyStopping: how often the loss is measured that shall fall",
    ),
    _finetune(
        "no patience",
        {"spec.training": {"evaluationSteps": 5, "earlyStopping": {"patience": 0}}},
        "earlyStopping.patience",
        "greater than or equal to 1",
    ),
    _finetune(
        "a negative improvement",
        {"spec.training": {"evaluationSteps": 5, "earlyStopping": {"minimumImprovement": "-1"}}},
        "earlyStopping.minimumImprovement",
        'at least 0 and at most 100, such as "0.001"',
    ),
    _finetune(
        "no rows to measure on",
        {"spec.training": {"evaluationSteps": 5}, "spec.dataset.split": {"validation": "0"}},
        "spec.training.evaluationSteps",
        "must have validation rows to measure the loss on: set dataset.split.validation above 0, give sources in "
        "dataset.validation, or leave evaluationSteps out",
    ),
    _finetune(
        "noise beside a learned prompt",
        {"spec.method": "PromptTuning", "spec.exports": _ADAPTER, "spec.training": {"neftuneAlpha": "5"}},
        "spec.training.neftuneAlpha",
        "must be left out with PromptTuning and PrefixTuning: they learn what stands before the embeddings",
    ),
    _finetune(
        "noise without a scale",
        {"spec.training": {"neftuneAlpha": "0"}},
        "spec.training.neftuneAlpha",
        'greater than 0 and at most 100, such as "5"',
    ),
    _finetune(
        "no checkpoints",
        {"spec.training": {"checkpoints": {"keep": 0}}},
        "checkpoints.keep",
        "greater than or equal to 1",
    ),
    # Profile, exports, gates
    _finetune("a profile with capitals", {"spec.accelerator": {"profile": "RTX 4090"}}, "accelerator.profile", LABEL),
    _finetune("no exports", {"spec.exports": []}, "spec.exports", "should have at least 1 items"),
    _finetune(
        "an unknown format",
        {"spec.exports": [{"name": "small", "format": "ZIP"}]},
        "spec.exports[0].format",
        'supported values: "Adapter", "Merged"',
    ),
    _finetune(
        "an export twice",
        {"spec.exports": [{"name": "a", "format": "Merged"}, {"name": "a", "format": "Adapter"}]},
        "spec.exports[1]",
        "Duplicate value",
    ),
    _finetune(
        "a format twice",
        {"spec.exports": [{"name": "a", "format": "Merged"}, {"name": "b", "format": "Merged"}]},
        "spec.exports",
        "must have each format once: two exports of one format would be the same artifact",
    ),
    _finetune(
        "an export with a capital", {"spec.exports": [{"name": "A", "format": "Merged"}]}, "exports[0].name", LABEL
    ),
    _finetune(
        "a gate without a bound",
        {"spec.gates": [{"metric": "accuracy"}]},
        "spec.gates[0]",
        "must set exactly one of atLeast and atMost",
    ),
    _finetune(
        "a gate with two bounds",
        {"spec.gates": [{"metric": "accuracy", "atLeast": "0.1", "atMost": "0.9"}]},
        "spec.gates[0]",
        "must set exactly one of atLeast and atMost",
    ),
    _finetune(
        "a gate in percent", {"spec.gates": [{"metric": "accuracy", "atLeast": "80"}]}, "gates[0].atLeast", _RATIO
    ),
    _finetune(
        "a gate on another export",
        {"spec.gates": [{"metric": "accuracy", "atLeast": "0.8", "export": "adapter"}]},
        "spec.gates",
        "must name, in export, one of the exports, or leave export out to check all of them",
    ),
    _finetune(
        "an unknown metric", {"spec.gates": [{"metric": "f1", "atLeast": "0.8"}]}, "gates[0].metric", '"macroF1"'
    ),
    _finetune(
        "a metric of instructions",
        {"spec.gates": [{"metric": "exactMatch", "atLeast": "0.8"}]},
        "spec.gates",
        "must name only accuracy, macroF1 and invalidRatio when the task is classification",
    ),
    _finetune(
        "a metric of classifications",
        {**INSTRUCTION, "spec.gates": [{"metric": "accuracy", "atLeast": "0.8"}]},
        "spec.gates",
        "must name only exactMatch when the task is instruction",
    ),
    *(
        _finetune(
            f"a metric of classifications for a {task}",
            {"spec.task": {task: {}}, "spec.gates": [{"metric": "accuracy", "atLeast": "0.8"}]},
            "spec.gates",
            f"must name only exactMatch when the task is {task}",
        )
        for task in ("completion", "conversation", "preference")
    ),
    _finetune(
        "a metric of answers for texts",
        {"spec.task": {"text": {}}, "spec.gates": [{"metric": "exactMatch", "atLeast": "0.8"}]},
        "spec.gates",
        "must name only tokenAccuracy when the task is text",
    ),
    _finetune(
        "an evaluation of nothing", {"spec.evaluation": {"maxSamples": 0}}, "evaluation.maxSamples", "equal to 1"
    ),
    # Output and running
    _finetune(
        "a size that is no quantity",
        {"spec.output": {"claim": {"size": "20 GB"}}},
        "spec.output.claim.size",
        "must be a quantity of bytes greater than 0, such as 20Gi",
    ),
    _finetune(
        "a size of 0", {"spec.output": {"claim": {"size": "0"}}}, "output.claim.size", "greater than 0, such as 20Gi"
    ),
    _finetune(
        "an access mode for readers",
        {"spec.output": {"claim": {"accessMode": "ReadOnlyMany"}}},
        "accessMode",
        "ReadWriteMany",
    ),
    _finetune("an unknown policy", {"spec.output": {"deletionPolicy": "Keep"}}, "deletionPolicy", '"Retain", "Delete"'),
    _finetune("endless retries", {"spec.retries": 1000}, "spec.retries", "should be less than or equal to 20"),
    _finetune(
        "a negative deadline", {"spec.deadlineSeconds": -1}, "spec.deadlineSeconds", "greater than or equal to 1"
    ),
    _finetune("suspend as a word", {"spec.suspend": "yes"}, "spec.suspend", "must be of type boolean"),
)

EDITS = (
    WrongEdit(
        name="a smaller claim",
        before={"spec.output": {"claim": {"size": "20Gi"}}},
        after={"spec.output": {"claim": {"size": "19Gi"}}},
        place="spec.output.claim.size",
        sentence="must not shrink: a claim can only grow; write the old size or a larger one",
    ),
    WrongEdit(
        name="another storage class",
        before={"spec.output": {"claim": {"storageClass": "fast"}}},
        after={"spec.output": {"claim": {"storageClass": "slow"}}},
        place="spec.output.claim.storageClass",
        sentence="must not change: a claim keeps its storage class; delete the FineTune and its claim to move it",
    ),
    WrongEdit(
        name="a storage class afterwards",
        before={},
        after={"spec.output": {"claim": {"storageClass": "slow"}}},
        place="spec.output.claim.storageClass",
        sentence="must not change: a claim keeps its storage class; delete the FineTune and its claim to move it",
    ),
    WrongEdit(
        name="another access mode",
        before={"spec.output": {"claim": {"accessMode": "ReadWriteOnce"}}},
        after={"spec.output": {"claim": {"accessMode": "ReadWriteMany"}}},
        place="spec.output.claim.accessMode",
        sentence="must not change: a claim keeps its access mode; delete the FineTune and its claim to change it",
    ),
)

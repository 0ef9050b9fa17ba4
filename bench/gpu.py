"""What the benchmarks on a GPU share: a random model of a real shape, a smaller card, and the file of results."""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "tests")]


def parser_of(description: str | None, *, name: str, shapes: Iterable[str], shape: str) -> argparse.ArgumentParser:
    """What every one of them is asked: the shape, the size of the card, where the results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes, default=shape)
    parser.add_argument("--cap-gib", type=float, default=24.0)
    parser.add_argument("--results", type=Path, default=ROOT / f"bench/results/{name}.json")
    return parser


def write_base(directory: Path, *, sizes: dict[str, Any]) -> None:
    """The tiny model's tokenizer with random weights of these sizes, in shards of 2 GB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from support.tiny import write_tiny_model

    write_tiny_model(directory)
    config = AutoConfig.from_pretrained(directory)
    config.update({"vocab_size": 32000, **sizes})
    config.head_dim = config.hidden_size // config.num_attention_heads
    (directory / "model.safetensors").unlink()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, max_shard_size="2GB")
    torch.set_default_dtype(torch.float32)


def cap_memory(gib: float) -> None:
    """Lets torch take no more of the card in the processes that follow, which read this at their start."""
    import torch

    share = gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:True,per_process_memory_fraction:{share:.4f}"


def write_results(path: Path, *, name: str, shape: str, cap_gib: float, figures: dict[str, Any]) -> None:
    import torch

    asked = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "name": name,
        "commit": asked.stdout.strip() or "unknown",
        "shape": shape,
        "machine": {"gpu": torch.cuda.get_device_name(0), "cap_gib": cap_gib, "kernel": platform.release()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

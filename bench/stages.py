#!/usr/bin/env python3
"""All stages on this machine's accelerator, on a random model of a real shape: times, tokens a second, peak memory.

    python bench/stages.py --shape 1b --cap-gib 24 [--results bench/results/stages.json]

Weights are random, so the accuracy means nothing; shapes, kernels and bytes are real. `--cap-gib` limits what torch may
take of a larger card, so that it stands for a smaller one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "tests")]

from support.stages import Finished, Workspace  # noqa: E402
from support.tiny import LABELS, reviews, write_jsonl, write_tiny_model  # noqa: E402
from tuneserve_pipeline.contract import (  # noqa: E402
    Checkpoints,
    ClaimFile,
    ClassificationTask,
    EvaluateSpec,
    EvaluationTarget,
    LocalModel,
    MergeSpec,
    PrepareSpec,
    Runtime,
    TrainSpec,
)

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def write_base(directory: Path, *, shape: str) -> None:
    """The tiny model's tokenizer with random weights of the shape, in shards of 2 GB."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tiny_model(directory)
    config = AutoConfig.from_pretrained(directory)
    config.update({**SHAPES[shape], "num_key_value_heads": 8, "vocab_size": 32000, "head_dim": None})
    config.head_dim = config.hidden_size // config.num_attention_heads
    (directory / "model.safetensors").unlink()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, max_shard_size="2GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cap-gib", type=float, default=24.0)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/stages.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return measure(Path(scratch), options)


def measure(scratch: Path, options: argparse.Namespace) -> int:
    import torch

    write_base(scratch / "base", shape=options.shape)
    total = torch.cuda.get_device_properties(0).total_memory
    # Read by torch at its start, so it holds in every stage's process.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{options.cap_gib * 2**30 / total:.4f}"
    write_jsonl(scratch / "datasets/data/reviews.jsonl", reviews(900))
    space = Workspace(root=scratch, base_model=scratch / "base")
    gpu = Runtime(device="cuda", checkpoints=Checkpoints(steps=10))
    rows: list[dict[str, object]] = []

    def run(name: str, spec: object, parents: dict[str, Finished], runtime: Runtime) -> Finished:
        started = time.monotonic()
        done = space.run(space.config(spec, name=name, parents=parents, runtime=runtime), timeout=1200)
        seconds = time.monotonic() - started
        print(f"{name}: exit {done.code} in {seconds:.1f} s {dict(done.outcome.metrics)} {dict(done.outcome.facts)}")
        if done.code:
            print(done.log[-3000:], done.outcome.error)
            raise SystemExit(1)
        rows.append({"stage": name, "seconds": round(seconds, 1), "metrics": dict(done.outcome.metrics)})
        return done

    source = ClaimFile(claim="data", path="reviews.jsonl")
    prepare_spec = PrepareSpec(
        base_model=LocalModel(claim="base"), train=(source,), task=ClassificationTask(labels=LABELS)
    )
    prepared = run("prepare", prepare_spec, {}, Runtime(device="cpu"))
    train_spec = TrainSpec(max_steps=options.steps)
    trained = run("train", train_spec, {"prepare": prepared}, gpu)
    merged = run("merge", MergeSpec(), {"prepare": prepared, "train": trained}, Runtime(device="cpu"))
    for target, parents in (
        (EvaluationTarget.ADAPTER, {"prepare": prepared, "train": trained}),
        (EvaluationTarget.MERGED, {"prepare": prepared, "merge": merged}),
    ):
        run(f"evaluate-{target}", EvaluateSpec(target=target, max_samples=64), parents, gpu)
    write_results(options, rows)
    return 0


def write_results(options: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    import torch

    asked = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "name": "stages",
        "commit": asked.stdout.strip() or "unknown",
        "shape": options.shape,
        "machine": {"gpu": torch.cuda.get_device_name(0), "cap_gib": options.cap_gib, "kernel": platform.release()},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        "stages": rows,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

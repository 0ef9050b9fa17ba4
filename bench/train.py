#!/usr/bin/env python3
"""QLoRA of a LLaMA-2-7B shape through the real `train` stage: real tokens a second and peak memory, packed and padded.

    python bench/train.py --shape 7b --cap-gib 24 [--results bench/results/train.json]

Weights are random, lengths are those of instruction data (median 110 tokens, at most 512): kernels, bytes and the work
are real, the loss means nothing. `--cap-gib` limits what torch may take of a larger card. The figure is the stage's own
`tokensPerSecond`: without padding, from the end of the first step on, with the trainer, its logs and its checkpoints.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

from gpu import cap_memory, parser_of, write_base, write_results

from support.stages import Finished, Workspace
from support.tiny import write_jsonl
from tuneserve_pipeline.contract import (
    Checkpoints,
    ClaimFile,
    InstructionTask,
    LocalModel,
    PrepareSpec,
    Runtime,
    Split,
    TrainSpec,
)

SHAPES = {
    "tiny": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
}
#: What a run trains with, and how many steps are enough for 25 s.
RECIPES: dict[str, dict[str, object]] = {
    "packed, 4096 tokens a step": {"global_batch_tokens": 4096, "max_steps": 160},
    "packed, 64 rows a step": {"global_batch_size": 64, "max_steps": 70},
    "padded, 16 rows a step": {"global_batch_size": 16, "max_steps": 24, "packing": "Never"},
}


def instruction_rows(count: int) -> list[dict[str, str]]:
    """Rows whose lengths in tokens have the spread of instruction data; a word is a token of the tiny tokenizer."""
    dice = random.Random(0)
    rows = []
    for _ in range(count):
        length = max(16, min(500, int(dice.lognormvariate(math.log(110), 0.7))))
        asked = max(2, int(0.6 * length) - 6)
        words = [dice.choice(("great", "slow", "plain", "film", "phone", "room")) for _ in range(length)]
        rows.append({"instruction": " ".join(words[:asked]), "output": " ".join(words[asked:]) or "plain"})
    return rows


def main() -> int:
    parser = parser_of(__doc__, name="train", shapes=SHAPES, shape="7b")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="all of them unless named")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return measure(Path(scratch), options)


def measure(scratch: Path, options: argparse.Namespace) -> int:
    write_base(scratch / "base", sizes=SHAPES[options.shape])
    cap_memory(options.cap_gib)
    write_jsonl(scratch / "datasets/data/rows.jsonl", instruction_rows(20000))
    space = Workspace(root=scratch, base_model=scratch / "base")

    def run(name: str, spec: PrepareSpec | TrainSpec, parents: dict[str, Finished], device: str) -> Finished:
        started = time.monotonic()
        done = space.run(
            space.config(spec, parents=parents, runtime=Runtime(device=device, checkpoints=Checkpoints(steps=1000))),
            timeout=580,
        )  # type: ignore[arg-type]
        seconds = time.monotonic() - started
        print(f"{name}: exit {done.code} in {seconds:.1f} s {dict(done.outcome.metrics)}", flush=True)
        print("\n".join(line for line in done.log.splitlines() if "layers are" in line or "end to end" in line))
        if done.code:
            print(done.log[-6000:], done.outcome.error)
            raise SystemExit(1)
        return done

    prepared = run(
        "prepare",
        PrepareSpec(
            base_model=LocalModel(claim="base"),
            train=(ClaimFile(claim="data", path="rows.jsonl"),),
            task=InstructionTask(),
            split=Split(validation=0.01, test=0.01),
            max_sequence_length=512,
        ),
        {},
        "cpu",
    )
    recipes = {}
    for name in options.recipe or RECIPES:
        spec = TrainSpec.model_validate({"max_sequence_length": 512, **RECIPES[name]})
        done = run(name, spec, {"prepare": prepared}, "cuda")
        recipes[name] = {
            "real_tok_s": round(done.outcome.metrics["tokensPerSecond"]),
            "peak_gib": done.outcome.metrics["peakMemoryGiB"],
            "loss": round(done.outcome.metrics["loss"], 3),
            "steps": int(done.outcome.facts["steps"]),
        }
    print(json.dumps(recipes, indent=2))
    write_results(
        options.results, name="train", shape=options.shape, cap_gib=options.cap_gib, figures={"recipes": recipes}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

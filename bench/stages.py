#!/usr/bin/env python3
"""All stages on this machine's accelerator, on a random model of a real shape: times, tokens a second, peak memory.

    python bench/stages.py --shape 1b --cap-gib 24 [--results bench/results/stages.json]

Weights are random, so the accuracy means nothing; shapes, kernels and bytes are real. `--cap-gib` limits what torch may
take of a larger card, so that it stands for a smaller one.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from gpu import cap_memory, parser_of, write_base, write_results

from support.stages import Finished, Workspace
from support.tiny import LABELS, reviews, write_jsonl
from tuneserve_pipeline.contract import (
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

_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_HEADS},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, **_HEADS},
}


def main() -> int:
    parser = parser_of(__doc__, name="stages", shapes=SHAPES, shape="1b")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return measure(Path(scratch), options)


def measure(scratch: Path, options: argparse.Namespace) -> int:
    write_base(scratch / "base", sizes=SHAPES[options.shape])
    cap_memory(options.cap_gib)
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
    write_results(
        options.results, name="stages", shape=options.shape, cap_gib=options.cap_gib, figures={"stages": rows}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

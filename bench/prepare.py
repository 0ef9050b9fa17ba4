#!/usr/bin/env python3
"""`prepare` on many short rows: seconds and peak memory of the whole stage, and of reading its rows for training.

    python bench/prepare.py [--rows 1000000] [--base DIRECTORY] [--results bench/results/prepare.json]

`--base` is a model with its tokenizer; without it a tiny one is made, whose tokenizer has few tokens. The rows are
made-up reviews with a label, about 70 tokens each with a tokenizer of 50,000 tokens. `load` in the results is that of
the machine at the end: what else ran on its cores.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "tests")]

from support.stages import Workspace  # noqa: E402
from support.tiny import LABELS, reviews, write_jsonl  # noqa: E402
from tuneserve_pipeline.contract import ClaimFile, ClassificationTask, LocalModel, PrepareSpec  # noqa: E402
from tuneserve_pipeline.rows import read_rows  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/prepare.json")
    options = parser.parse_args()
    # The stage's default: tests switch it off.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as scratch:
        return measure(Path(scratch), options)


def measure(scratch: Path, options: argparse.Namespace) -> int:
    base = options.base or write_base(scratch / "base")
    write_jsonl(scratch / "datasets/data/reviews.jsonl", reviews(options.rows))
    space = Workspace(root=scratch, base_model=base)
    spec = PrepareSpec(
        base_model=LocalModel(claim="base"),
        train=(ClaimFile(claim="data", path="reviews.jsonl"),),
        task=ClassificationTask(labels=LABELS),
    )
    config = space.config(spec)
    command = space.command(config)
    # What this process has when it forks would count in the child's `ru_maxrss`, so the child tells itself.
    program = "import re, sys; from pathlib import Path; from tuneserve_pipeline.__main__ import main; code = main(); "
    program += "print(re.search('VmHWM:\\\\s+([0-9]+) kB', Path('/proc/self/status').read_text())[1]); sys.exit(code)"
    command[1:3] = ["-c", program]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    environment = {**space.environment(), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        print(done.stderr[-3000:])
        return 1
    output = Path(config.output)
    started = time.monotonic()
    rows = read_rows(output / "train.parquet")
    reading = time.monotonic() - started
    report = json.loads((output / "report.json").read_text())
    write_results(
        options,
        {
            "rows": options.rows,
            "tokens": sum(entry["total"] for entry in report["tokens"].values()),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
            "peak_mib": round(int(done.stdout) / 1024),
            "train_rows": len(rows),
            "read_seconds": round(reading, 2),
            "train_parquet_mib": round((output / "train.parquet").stat().st_size / 2**20, 1),
            "vocabulary": json.loads((base / "config.json").read_text())["vocab_size"],
        },
    )
    return 0


def write_base(directory: Path) -> Path:
    """In a process of its own: torch must not be in the memory that is measured."""
    code = "import sys; from pathlib import Path; from support.tiny import write_tiny_model; "
    code += "write_tiny_model(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([sys.executable, "-c", code, str(directory)], env=environment, check=True)
    return directory


def write_results(options: argparse.Namespace, figures: dict[str, object]) -> None:
    asked = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {
        "name": "prepare",
        "commit": asked.stdout.strip() or "unknown",
        "machine": {"cores": len(os.sched_getaffinity(0)), "kernel": platform.release(), "load": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "pyarrow")},
        **figures,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    sys.exit(main())

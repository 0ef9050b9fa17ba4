"""The programs that the demo runs, as a user would run them: kubectl, helm, and the scripts of this repository."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
EXTERNAL = os.environ.get("CLUSTER") == "external"
# For pods that read and write claims; the cluster of this repository has its own, since it reaches no registry.
BUSYBOX = os.environ.get("TUNESERVE_BUSYBOX") or ("busybox:stable" if EXTERNAL else "cluster.tuneserve.dev/busybox:1")
Object = dict[str, Any]


class DemoError(Exception):
    """What went wrong and what to do."""


def say(text: str = "") -> None:
    print(text, flush=True)


def headline(text: str) -> None:
    say(f"\n== {text}")


def run(*words: str | Path, failure: str) -> None:
    """Run a program that tells its progress itself; raises DemoError."""
    code = subprocess.run([str(word) for word in words], cwd=ROOT).returncode
    if code:
        raise DemoError(f"{failure} ({Path(words[0]).name} ended with {code})")


def output(*words: str | Path, stdin: str | None = None) -> str:
    """What a program prints; raises DemoError with what it says when it fails."""
    done = subprocess.run([str(word) for word in words], cwd=ROOT, input=stdin, capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(str(word) for word in words[:5])
        raise DemoError(f"{shown}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def tool(name: str) -> list[str]:
    """kubectl or helm for the cluster in use."""
    return [name] if EXTERNAL else [str(ROOT / "cluster/cluster"), name]


@dataclass(frozen=True)
class Kubectl:
    """kubectl in one namespace."""

    namespace: str

    def run(self, *words: str | Path, stdin: str | None = None) -> str:
        return output(*tool("kubectl"), "--namespace", self.namespace, *words, stdin=stdin)

    def get(self, kind: str, name: str) -> Object | None:
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return dict(json.loads(text)) if text.strip() else None

    def list(self, kind: str, *, selector: str = "") -> list[Object]:
        return list(json.loads(self.run("get", kind, "--selector", selector, "-o", "json"))["items"])

    def apply(self, *sources: Path | Object) -> None:
        """Files, or objects."""
        for source in sources:
            if isinstance(source, Path):
                self.run("apply", "--server-side", "--force-conflicts", "-f", source)
            else:
                self.run("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(source))

    def follow(
        self, kind: str, name: str, *, until: Callable[[Object], bool], show: Callable[[Object], None], seconds: float
    ) -> Object:
        """Look at an object again and again; raises DemoError when it is Stalled, is gone, or the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.get(kind, name)
            if found is None:
                raise DemoError(f"{kind} {name} is gone from the namespace {self.namespace}")
            show(found)
            if until(found):
                return found
            stalled = condition(found, "Stalled")
            if stalled.get("status") == "True":
                raise DemoError(f"{kind} {name} is stalled: {stalled.get('reason')}: {stalled.get('message')}")
            if time.monotonic() > deadline:
                last = condition(found, "Reconciling") or condition(found, "Ready")
                raise DemoError(f"{kind} {name} is not Ready after {seconds / 60:.0f} min: {last.get('message', '')}")
            time.sleep(POLL_SECONDS)


POLL_SECONDS = 2.0


def condition(found: Mapping[str, Any], type: str) -> Object:
    """The condition of that type, if it is about the object as it is now; else an empty one."""
    for item in found.get("status", {}).get("conditions", []):
        if item["type"] == type and item.get("observedGeneration", 0) >= found["metadata"]["generation"]:
            return dict(item)
    return {}


def is_ready(found: Mapping[str, Any]) -> bool:
    return condition(found, "Ready").get("status") == "True"


def minutes(seconds: float) -> str:
    """A duration as people say it."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02} s"


def python(*words: str | Path) -> Sequence[str | Path]:
    return (sys.executable, *words)

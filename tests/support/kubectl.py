"""kubectl as a user runs it: what the tests on real clusters look at and act through."""

import json
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]


class KubectlError(AssertionError):
    """kubectl said no; the message is its own."""


@dataclass(frozen=True, kw_only=True)
class Kubectl:
    """One cluster and one namespace."""

    command: tuple[str, ...] = ("kubectl",)
    namespace: str
    pause: float = 0.5
    """Seconds between two looks: each costs as much as a kubectl does."""

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        done = subprocess.run(
            [*self.command, "--namespace", self.namespace, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Object) -> None:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.run("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=text)

    def apply_file(self, path: str) -> None:
        self.run("apply", "--server-side", "--force-conflicts", "-f", path)

    def get(self, kind: str, name: str) -> Object | None:
        text = self.run("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, *, selector: str = "", field: str = "") -> list[Object]:
        return json.loads(self.run("get", kind, "-l", selector, "--field-selector", field, "-o", "json"))["items"]

    def patch(self, kind: str, name: str, patch: Object, *, subresource: str = "") -> None:
        extra = [f"--subresource={subresource}"] if subresource else []
        self.run("patch", kind, name, "--type=merge", "-p", json.dumps(patch), *extra)

    def delete(self, kind: str, name: str, *, wait: bool = True, grace_seconds: int | None = None) -> None:
        extra = [] if grace_seconds is None else [f"--grace-period={grace_seconds}"]
        self.run("delete", kind, name, "--ignore-not-found", f"--wait={str(wait).lower()}", *extra)

    def wait(self, kind: str, name: str, until: Callable[[Object], bool], *, timeout: float = 120) -> Object:
        """The object, as soon as `until` holds; AssertionError with its conditions and pods when it never does."""
        deadline = time.monotonic() + timeout
        while True:
            found = self.get(kind, name)
            if found is not None and until(found):
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"{kind} {name} did not get there in {timeout:.0f} s:\n{self.describe(found)}")
            time.sleep(self.pause)

    def wait_gone(self, kind: str, *, selector: str = "", field: str = "", timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while left := self.list(kind, selector=selector, field=field):
            names = ", ".join(item["metadata"]["name"] for item in left)
            assert time.monotonic() < deadline, f"still there after {timeout:.0f} s: {names}"
            time.sleep(self.pause)

    def describe(self, found: Object | None) -> str:
        lines = ["(not found)"] if found is None else [json.dumps(found.get("status", {}), indent=1)]
        for pod in self.list("pods"):
            state = json.dumps([c.get("state") for c in pod["status"].get("containerStatuses", [])])
            lines.append(f"pod {pod['metadata']['name']} {pod['status'].get('phase')} {state[:600]}")
        return "\n".join(lines)


def condition(found: Object, type: str) -> Object:
    """The condition of that type; an empty one while it is missing."""
    listed: Iterable[Object] = found.get("status", {}).get("conditions", [])
    return next((item for item in listed if item["type"] == type), {})


def is_true(type: str) -> Callable[[Object], bool]:
    """Whether a condition is True for the object's present generation."""

    def check(found: Object) -> bool:
        seen = condition(found, type)
        return seen.get("status") == "True" and seen.get("observedGeneration") == found["metadata"]["generation"]

    return check


def stage(found: Object, name: str) -> Object:
    """The stage of that name in a FineTune's status; an empty one while it is missing."""
    return next((item for item in found.get("status", {}).get("stages", []) if item["name"] == name), {})

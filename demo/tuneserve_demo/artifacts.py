"""Reads what a stage left on the claim of a FineTune, through a pod that sees it read-only."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tuneserve_demo.answers import Question
from tuneserve_demo.tools import EXTERNAL, DemoError, Kubectl, Object

IMAGE = "busybox:stable" if EXTERNAL else "cluster.tuneserve.dev/busybox:1"
POD = "read-predictions"
USER = 10001


def predictions(kubectl: Kubectl, finetune: Mapping[str, Any]) -> list[Question]:
    """All test rows with the answers of the merged model, as the evaluation recorded them."""
    status = finetune["status"]
    stage = next(stage for stage in status["stages"] if stage["name"] == "evaluate-merged")
    path = f"{stage['name']}/{stage['hash']}/predictions.jsonl"
    text = read(kubectl, claim=status["artifacts"][0]["claim"], path=path)
    return [question(json.loads(line)) for line in text.splitlines()]


def question(row: Mapping[str, Any]) -> Question:
    return Question(messages=row["prompt"], expected=row["expected"], answer=row["answer"])


def like(row: Question, text: str) -> Sequence[Mapping[str, str]]:
    """The same task for another text: the instruction of a row stands before its text."""
    instruction, _, _ = row.messages[-1]["content"].partition("\n\n")
    return [*row.messages[:-1], {"role": "user", "content": f"{instruction}\n\n{text}"}]


def read(kubectl: Kubectl, *, claim: str, path: str) -> str:
    """The text of a file on a claim."""
    kubectl.run("delete", "pod", POD, "--ignore-not-found")
    kubectl.apply(reader(claim=claim, path=path))
    try:
        kubectl.run("wait", f"pod/{POD}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s")
        return kubectl.run("logs", POD)
    except DemoError as error:
        raise DemoError(f"{path} on the claim {claim} cannot be read: {error}") from error
    finally:
        kubectl.run("delete", "pod", POD, "--ignore-not-found")


def reader(*, claim: str, path: str) -> Object:
    container = {
        "name": "read",
        "image": IMAGE,
        "command": ["cat", f"/claim/{path}"],
        "volumeMounts": [{"name": "claim", "mountPath": "/claim", "readOnly": True}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD}, "spec": spec}

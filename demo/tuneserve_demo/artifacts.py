"""Reads what a stage left on the claim of a FineTune, through a pod that sees it read-only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuneserve_demo.answers import Evaluation, Question
from tuneserve_demo.tools import BUSYBOX, DemoError, Kubectl, Object

POD = "read-predictions"
USER = 10001


def evaluation(kubectl: Kubectl, finetune: Mapping[str, Any]) -> Evaluation:
    """All test rows with the answers of the merged model, as the stage that evaluated it left them."""
    status = finetune["status"]
    stage = next(stage for stage in status["stages"] if stage["name"] == "evaluate-merged")
    folder = f"{stage['name']}/{stage['hash']}"
    paths = [f"{folder}/metrics.json", f"{folder}/predictions.jsonl"]
    metrics, *rows = documents(read(kubectl, claim=status["artifacts"][0]["claim"], paths=paths))
    return Evaluation(max_tokens=metrics["maxNewTokens"], questions=[question(row) for row in rows])


def documents(text: str) -> Iterator[Any]:
    """The JSON documents that stand one after another in a text."""
    decoder, end = json.JSONDecoder(), 0
    while text[end:].strip():
        start = end + len(text[end:]) - len(text[end:].lstrip())
        document, end = decoder.raw_decode(text, start)
        yield document


def question(row: Mapping[str, Any]) -> Question:
    return Question(messages=row["messages"], answer=row["answer"])


def like(row: Question, text: str) -> Sequence[Mapping[str, str]]:
    """The same task for another text: the instruction of a row stands before its text."""
    instruction, _, _ = row.messages[-1]["content"].partition("\n\n")
    return [*row.messages[:-1], {"role": "user", "content": f"{instruction}\n\n{text}"}]


def read(kubectl: Kubectl, *, claim: str, paths: Sequence[str]) -> str:
    """The text of files on a claim, one after another."""
    kubectl.run("delete", "pod", POD, "--ignore-not-found")
    kubectl.apply(reader(claim=claim, paths=paths))
    try:
        kubectl.run("wait", f"pod/{POD}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s")
        return kubectl.run("logs", POD)
    except DemoError as error:
        raise DemoError(f"{', '.join(paths)} on the claim {claim} cannot be read: {error}") from error
    finally:
        kubectl.run("delete", "pod", POD, "--ignore-not-found")


def reader(*, claim: str, paths: Sequence[str]) -> Object:
    container = {
        "name": "read",
        "image": BUSYBOX,
        "command": ["cat", *(f"/claim/{path}" for path in paths)],
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

"""Asks the served model through its OpenAI endpoint, and compares its answers with those that were evaluated."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

from tuneserve_demo.tools import EXTERNAL, DemoError, Kubectl, say, tool

AT_ONCE = 8


@dataclass(frozen=True)
class Question:
    """A test row, as the evaluation asked it and what the model answered then."""

    messages: Sequence[Mapping[str, str]]
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation asked, and how long an answer could be."""

    max_tokens: int
    questions: Sequence[Question]


@contextmanager
def endpoint(kubectl: Kubectl, name: str) -> Iterator[openai.OpenAI]:
    """A client of the Service: at its cluster address, or through kubectl on a cluster that is not of this machine."""
    service = kubectl.get("service", name)
    if service is None:
        raise DemoError(f"there is no service {name} in the namespace {kubectl.namespace}")
    if not EXTERNAL:
        yield client(f"{service['spec']['clusterIP']}:80")
        return
    command = [*tool("kubectl"), "--namespace", kubectl.namespace, "port-forward", f"service/{name}", ":80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as forward:
        assert forward.stdout is not None
        try:
            said = forward.stdout.readline()
            if not (port := re.search(r"127\.0\.0\.1:(\d+)", said)):
                raise DemoError(f"kubectl port-forward says: {said.strip()}")
            yield client(f"127.0.0.1:{port[1]}")
        finally:
            forward.terminate()


def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", timeout=120)


def stream(api: openai.OpenAI, *, model: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> None:
    """Print an answer as it comes."""
    request: Any = {"model": model, "messages": list(messages), "temperature": 0, "max_tokens": max_tokens}
    for chunk in api.chat.completions.create(stream=True, **request):
        if chunk.choices:
            sys.stdout.write(chunk.choices[0].delta.content or "")
            sys.stdout.flush()
    say()


def ask(api: openai.OpenAI, *, model: str, questions: Sequence[Question], max_tokens: int) -> list[str]:
    """The endpoint's answers, in order; several are under way at the same time."""

    def one(question: Question) -> str:
        request: Any = {"model": model, "messages": list(question.messages), "temperature": 0}
        done = api.chat.completions.create(max_tokens=max_tokens, **request)
        return done.choices[0].message.content or ""

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(one, questions))


def differing(questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[Question, str]]:
    """The questions that were answered otherwise than in the evaluation; spaces around an answer do not count."""
    pairs = zip(questions, answers, strict=True)
    return [(question, answer) for question, answer in pairs if question.answer.strip() != answer.strip()]

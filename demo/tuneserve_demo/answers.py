"""Asks the served model through its OpenAI endpoint, and compares its answers with those that were evaluated."""

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai

from tuneserve_demo.tools import DemoError, Kubectl, say

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


def client(kubectl: Kubectl, name: str) -> openai.OpenAI:
    """A client of the Service's cluster address, which this machine reaches."""
    service = kubectl.get("service", name)
    if service is None:
        raise DemoError(f"there is no service {name} in the namespace {kubectl.namespace}")
    return openai.OpenAI(base_url=f"http://{service['spec']['clusterIP']}/v1", api_key="none", timeout=120)


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

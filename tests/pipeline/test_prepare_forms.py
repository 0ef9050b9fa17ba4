"""Every form of rows that `prepare` takes, down to the tokens that are learned."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer

from support.stages import Finished, Workspace
from support.tiny import CHAT_TEMPLATE, reviews, write_jsonl
from tuneserve_pipeline.contract import (
    ClaimFile,
    CompletionTask,
    ConversationTask,
    ExitCode,
    InstructionTask,
    PreferenceTask,
    PrepareSpec,
    Split,
    Task,
    TemplateSpec,
    TextTask,
)
from tuneserve_pipeline.encoding import Encoder
from tuneserve_pipeline.examples import Example
from tuneserve_pipeline.templates import load_template, load_tokenizer
from tuneserve_pipeline.tokenization import read_base

Prepare = Callable[..., Finished]
#: All rows are trained on but one, so that each can be looked at.
FEW = Split(validation=0.0, test=0.01)
#: The documentation's example, as a user copies it.
LLAMA_2 = yaml.safe_load(
    (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
)["template"]["inline"]


@pytest.fixture
def prepare(workspace: Workspace, classification: PrepareSpec) -> Prepare:
    """Runs `prepare` on rows of a task."""

    def run(task: Task, *given: Any, **changes: Any) -> Finished:
        for number, rows in enumerate(given):
            write_jsonl(workspace.datasets / "c" / f"{number}.jsonl", rows)
        sources = tuple(ClaimFile(claim="c", path=f"{number}.jsonl") for number in range(len(given)))
        update = {"train": sources, "split": FEW, "task": task, **changes}
        return workspace.run_here(workspace.config(classification.model_copy(update=update)))

    return run


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def learned(finished: Finished, tokenizer: Tokenizer) -> list[list[str]]:
    """What each training row teaches, span by span."""
    assert finished.code == 0, finished.message
    rows: Any = finished.rows("train.parquet")
    return [
        [
            decode(tokenizer, row["input_ids"][start:end])
            for start, end in zip(row["loss_spans"][::2], row["loss_spans"][1::2], strict=True)
        ]
        for row in rows
    ]


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def chat(number: int, *, turns: int = 2, **more: object) -> dict[str, object]:
    messages = [turn("system", "Be brief.")]
    for place in range(turns):
        messages += [turn("user", f"Say {number}.{place}"), turn("assistant", f"It is {number}.{place}", **more)]
    return {"messages": messages}


def test_every_answer_of_a_conversation_is_learned(prepare: Prepare, tokenizer: Tokenizer) -> None:
    found = learned(prepare(ConversationTask(), [chat(n, turns=3) for n in range(20)]), tokenizer)
    assert len(found) == 19
    for spans in found:
        assert [span.removeprefix("It is ").split(".")[1] for span in spans] == [f"{n}<|im_end|>" for n in range(3)]


def test_answers_of_a_conversation_that_just_fits_are_all_learned(prepare: Prepare, tokenizer: Tokenizer) -> None:
    rows = [chat(n, turns=3) for n in range(20)]
    longest = max(len(row["input_ids"]) for row in prepare(ConversationTask(), rows).rows("train.parquet"))
    fits = learned(prepare(ConversationTask(), rows, max_sequence_length=longest), tokenizer)
    assert len(fits) == 19 and all(len(spans) == 3 for spans in fits)
    less = prepare(ConversationTask(), rows, max_sequence_length=longest - 1)
    assert (less.code, less.reason) == (ExitCode.INVALID_DATA, "RowsTooLong")


def test_a_conversation_ends_with_an_answer_and_evaluates_it(prepare: Prepare) -> None:
    finished = prepare(ConversationTask(), [chat(n) for n in range(20)])
    (row,) = finished.rows("test.jsonl")
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert row["completion"][0]["content"].startswith("It is ")


def test_share_gpt_conversations(prepare: Prepare, tokenizer: Tokenizer) -> None:
    rows = [
        {
            "id": f"{n}",
            "conversations": [
                {"from": "human", "value": f"Say {n}"},
                {"from": "gpt", "value": f"It is {n}"},
                {"from": "human", "value": "Thanks"},
            ],
        }
        for n in range(20)
    ]
    finished = prepare(ConversationTask(), rows)
    found = learned(finished, tokenizer)
    assert all(len(spans) == 1 and spans[0].startswith("It is") for spans in found)
    report: Any = finished.json("report.json")
    assert report["turnsWithoutAnswer"]["train"]["rows"] == 19
    assert any("nobody answers" in warning for warning in report["warnings"])


def test_an_answer_of_weight_0_is_shown_and_not_learned(prepare: Prepare, tokenizer: Tokenizer) -> None:
    rows: list[Any] = [chat(n) for n in range(20)]
    for row in rows:
        row["messages"][2]["weight"] = 0
    found = learned(prepare(ConversationTask(), rows), tokenizer)
    assert all(len(spans) == 1 and spans[0].endswith(".1<|im_end|>") for spans in found)


def test_a_template_that_renders_earlier_turns_otherwise_teaches_the_last_answer_only(
    prepare: Prepare, tokenizer: Tokenizer
) -> None:
    forgetful = CHAT_TEMPLATE.replace(
        "message['content'] +", "(message['content'] if loop.last or message['role'] == 'user' else '…') +"
    )
    finished = prepare(ConversationTask(), [chat(n) for n in range(20)], template=TemplateSpec(inline=forgetful))
    found = learned(finished, tokenizer)
    assert all(len(spans) == 1 and ".1" in spans[0] for spans in found)
    report: Any = finished.json("report.json")
    assert report["lastAnswerOnly"]["train"]["rows"] == 19
    assert any("last answer only" in warning for warning in report["warnings"])


def test_prompts_and_completions(prepare: Prepare, tokenizer: Tokenizer) -> None:
    texts = [{"prompt": f"Say {n}", "completion": f" {n}!"} for n in range(10)]
    messages = [
        {"prompt": [turn("user", f"Say {n} again")], "completion": [turn("assistant", f"{n}!")]} for n in range(10)
    ]
    found = learned(prepare(CompletionTask(), texts, messages), tokenizer)
    assert all(spans[0].endswith("!<|im_end|>") for spans in found)
    assert len(found) == 19 and all(len(spans) == 1 for spans in found)


def test_forms_are_recognised_file_by_file(prepare: Prepare, tokenizer: Tokenizer) -> None:
    finished = prepare(
        InstructionTask(),
        [{"instruction": f"Say {n}", "output": f"{n} a"} for n in range(8)],
        [{"prompt": f"Tell {n}", "completion": f"{n} b"} for n in range(8)],
        [chat(n, turns=1) for n in range(8)],
    )
    ends = {spans[0].removesuffix("<|im_end|>")[-1] for spans in learned(finished, tokenizer)}
    assert ends == {"a", "b", "0"}


def test_plain_text_is_learned_whole_and_cut_into_pieces(
    prepare: Prepare, tokenizer: Tokenizer, tiny_model: Path
) -> None:
    texts = [f"Text {n}. " + "so it goes on " * 40 * (n % 2) for n in range(20)]
    finished = prepare(TextTask(), [{"text": text} for text in texts], max_sequence_length=64)
    assert finished.code == 0, finished.message
    rows: Any = finished.rows("train.parquet")
    by_source: dict[str, list[int]] = {}
    for row in rows:
        assert len(row["input_ids"]) <= 64 and row["loss_spans"] == [0, len(row["input_ids"])]
        by_source.setdefault(row["source"], []).extend(row["input_ids"])
    assert len(by_source) == 19 and len(rows) > 19 + 9
    for source, ids in by_source.items():
        text = texts[int(source.rsplit(":", 1)[1]) - 1]
        assert decode(tokenizer, ids) == text + "<|im_end|>"
    report: Any = finished.json("report.json")
    assert report["cutTexts"]["train"]["rows"] in (9, 10) and report["tooLong"]["train"]["rows"] == 0


def test_pairs_of_answers(prepare: Prepare, tokenizer: Tokenizer) -> None:
    whole = [turn("user", "Say it"), turn("assistant", "No"), turn("user", "Please")]
    finished = prepare(
        PreferenceTask(),
        [{"prompt": f"Say {n}", "chosen": f"Yes {n}", "rejected": "No"} for n in range(10)],
        [
            {
                "chosen": [turn("user", f"{n}"), *whole, turn("assistant", "Yes")],
                "rejected": [turn("user", f"{n}"), *whole, turn("assistant", "Never")],
            }
            for n in range(10)
        ],
    )
    assert finished.code == 0, finished.message
    rows: Any = finished.rows("train.parquet")
    assert len(rows) == 19
    for row in rows:
        prompt, chosen, rejected = (decode(tokenizer, row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        assert prompt.startswith("<|im_start|>user\n") and prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert chosen.startswith("Yes") and chosen.endswith("<|im_end|>")
        assert rejected in ("No<|im_end|>", "Never<|im_end|>")


def test_a_template_of_the_spec_is_used_and_kept(prepare: Prepare, workspace: Workspace, tokenizer: Tokenizer) -> None:
    rows = [{"instruction": f"Say {n}", "output": f"It is {n}"} for n in range(20)]
    template = TemplateSpec(inline=LLAMA_2, system_prompt='Quote "{{ }}" and\n\\ üñ 😀 %}')
    finished = prepare(InstructionTask(), rows, template=template)
    assert finished.code == 0, finished.message
    row: Any = finished.rows("train.parquet")[0]
    text = decode(tokenizer, row["input_ids"])
    assert text.startswith('<|endoftext|><<SYS>>Quote "{{ }}" and\n\\ üñ 😀 %}<</SYS>><|endoftext|>[INST] Say ')
    start, end = row["loss_spans"]
    assert decode(tokenizer, row["input_ids"][start:end]).startswith(" It is ")
    assert decode(tokenizer, row["input_ids"][:start]).endswith("[/INST]")
    # What is served renders the same, without the user's saying so.
    base = read_base(finished.directory)
    question = [{"role": "user", "content": f"Say {row['source'].rsplit(':', 1)[1]}"}]
    assert base.template.render(question, prompt=True).startswith(text.split("[INST]")[0])
    own = [{"role": "system", "content": "Mine."}, *question]
    assert base.template.render(own, prompt=True).startswith("<|endoftext|><<SYS>>Mine.<</SYS>>")
    assert base.template.hash == finished.outcome.facts["templateHash"]


def test_what_is_tokenized_once_is_tokenized_as_ever(
    tiny_model: Path, tokenizer: Tokenizer, classification: PrepareSpec
) -> None:
    """After the first batch only what differs from row to row is: the tokens must be those of each whole text."""
    spec = TemplateSpec(system_prompt="Be brief. " * 20)
    template = load_template(tiny_model, name="tiny", spec=spec)
    fast = load_tokenizer(tiny_model, name="tiny", special_tokens=template.special_tokens)
    seen: list[str] = []
    encoder = Encoder(
        template=template,
        tokenizer=replace(fast, encode=lambda texts: [*map(seen.append, texts)] and fast.encode(texts)),
        name="tiny",
    )

    def example(content: str, answer: str) -> Example:
        said = ({"role": "user", "content": content},), ({"role": "assistant", "content": answer},)
        return Example(prompt=said[0], completion=said[1], source=content)

    odd = ["<|im_end|>", "<|im_start|>assistant\n", "<|im_start|>", "", "\n", " ü😀", "<|im_st", "assistant"]
    first = [example(f"Say {n}", f"It is {n}") for n in range(5)]
    later = [example(f"{a}say{b}", f"{b}it{a}") for a in odd for b in odd]
    for batch in (first, later):
        seen.clear()
        for found in encoder.tokenize(encoder.render(batch, limits=[10_000] * len(batch))):
            messages = (*found.example.prompt, *found.example.completion)
            ids = tokenizer.encode(template.render(messages, prompt=False), add_special_tokens=False).ids
            prompt = template.render(found.example.prompt, prompt=True)
            assert ids[: len(found.ids)] == found.ids and ids[len(found.ids) :] == ids[-1:]
            assert found.spans == [len(tokenizer.encode(prompt, add_special_tokens=False).ids), len(found.ids)]
    assert not any("Be brief" in text for text in seen)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for message in messages %}{{ message.content }}\n{% endif %}", ["line 2 of the template", "endif"]),
        ("{{ messages.append(1) }}", ["cannot render claim c: 0.jsonl:1", "SecurityError"]),
        ("{{ ''.__class__.__mro__ }}", ["SecurityError"]),
        ("{{ nothing.at.all }}", ["UndefinedError", "nothing"]),
        ("{{ raise_exception('no system') }}", ["no system"]),
    ],
)
def test_a_template_that_does_not_render_is_named(prepare: Prepare, template: str, says: list[str]) -> None:
    rows = [{"instruction": f"Say {n}", "output": f"It is {n}"} for n in range(20)]
    finished = prepare(InstructionTask(), rows, template=TemplateSpec(inline=template))
    assert (finished.code, finished.reason) == (ExitCode.INVALID_CONFIG, "TemplateFailed")
    for part in ("spec.template.inline", *says):
        assert part in finished.message


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        (ConversationTask(), {"messages": "hello"}, "'messages' is a str: it must be a list of messages"),
        (ConversationTask(), {"messages": [turn("user", "a")]}, "no message of the assistant"),
        (ConversationTask(), {"messages": [turn("assistant", "a")]}, "no message of the user before the answer"),
        (ConversationTask(), {"messages": [turn("user", "a"), turn("wizard", "b")]}, "messages[1].role is 'wizard'"),
        (
            ConversationTask(),
            {"messages": [turn("user", "a"), turn("assistant", " ")]},
            "messages[1].content' is empty",
        ),
        (ConversationTask(), {"messages": [turn("user", "a"), "b"]}, "messages[1] is a str"),
        (
            ConversationTask(),
            {"messages": [turn("user", "a"), turn("assistant", None, tool_calls=[{}])]},
            "calls a tool",
        ),
        (ConversationTask(), {"messages": [turn("user", "a"), turn("assistant", "b", weight=0)]}, "weight 0"),
        (TextTask(), {"text": ""}, "'text' is empty"),
        (TextTask(), {"text": "a\x00b"}, "NUL character (position 2)"),
        (TextTask(), {"text": "a\ud800"}, "half a character (U+D800 at position 2)"),
        (PreferenceTask(), {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
        (PreferenceTask(), {"chosen": "b", "rejected": "c"}, "has no 'prompt'"),
        (CompletionTask(), {"prompt": [], "completion": "b"}, "'prompt' is empty"),
        (InstructionTask(), {"instruction": "a", "output": ""}, "'output' is empty"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(
    prepare: Prepare, workspace: Workspace, task: Task, row: dict[str, Any], says: str
) -> None:
    path = workspace.datasets / "c" / "0.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = ClaimFile(claim="c", path="0.jsonl")
    finished = prepare(task, train=(source,))
    assert finished.code == ExitCode.INVALID_DATA
    assert finished.message.startswith("claim c: 0.jsonl:1: ") and says in finished.message


def test_mixed_forms_in_one_file_are_named_with_the_row_that_began_it(prepare: Prepare) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}]
    finished = prepare(InstructionTask(), rows)
    assert finished.code == ExitCode.INVALID_DATA
    assert "claim c: 0.jsonl:2: has no 'instruction' and 'output', it has: prompt, completion" in finished.message
    assert "claim c: 0.jsonl:1 has instruction, output" in finished.message


def test_sources_are_mixed_by_their_weights_and_limits(prepare: Prepare) -> None:
    def source(number: int, **more: Any) -> ClaimFile:
        return ClaimFile(claim="c", path=f"{number}.jsonl", **more)

    def rows(name: str) -> list[dict[str, str]]:
        return [{"instruction": f"Say {name} {n}", "output": name} for n in range(40)]

    finished = prepare(
        InstructionTask(),
        rows("a"),
        rows("b"),
        rows("c"),
        train=(source(0, weight=2.0), source(1, limit=10), source(2, weight=0.5)),
        split=Split(validation=0.1, test=0.1),
    )
    assert finished.code == 0, finished.message
    train = [row["source"] for row in finished.rows("train.parquet")]
    held = [row["source"] for name in ("validation.parquet", "test.jsonl") for row in finished.rows(name)]
    counts = {number: [train.count(place) for place in set(train) if f"{number}.jsonl" in place] for number in range(3)}
    assert set(counts[0]) == {2} and set(counts[1]) == {1} and set(counts[2]) == {1}
    assert len(held) == len(set(held)) == 18 and not set(held) & set(train)
    assert len(counts[1]) + sum("1.jsonl" in place for place in held) == 10
    assert 5 < len(counts[2]) < 30
    report: Any = finished.json("report.json")
    assert [entry["read"] for entry in report["sources"]] == [40, 10, 40]
    assert report["trainRowsByWeight"] == len(train) == int(finished.outcome.facts["trainRows"])


def test_an_end_of_turn_within_an_answer_is_reported(prepare: Prepare) -> None:
    rows = [{"instruction": f"Say {n}", "output": f"It is<|im_end|> {n}"} for n in range(20)]
    finished = prepare(InstructionTask(), rows)
    report: Any = finished.json("report.json")
    assert report["endsInsideAnswers"]["train"]["rows"] == 19
    assert any("learns to stop there" in warning for warning in report["warnings"])


def test_rare_labels_are_reported(prepare: Prepare, classification: PrepareSpec) -> None:
    rows = [row if n % 30 == 0 else {**row, "label": "neutral"} for n, row in enumerate(reviews(60))]
    finished = prepare(classification.task, rows, split=Split(validation=0.0, test=0.05))
    report: Any = finished.json("report.json")
    assert any("the label neutral has" in warning and "macroF1" in warning for warning in report["warnings"])
    assert any("no training row has the label positive" in warning for warning in report["warnings"])

"""How the demo compares what is served with what was evaluated, and which values it installs."""

from tuneserve_demo.answers import Question, differing
from tuneserve_demo.artifacts import documents, like
from tuneserve_demo.install import chart_values
from tuneserve_demo.story import comparison


def question(answer: str, text: str = "Classify the text.\n\nI like it.") -> Question:
    return Question(messages=[{"role": "user", "content": text}], answer=answer)


def test_answers_that_differ_are_found_and_spaces_do_not_count() -> None:
    asked = [question("positive"), question("neutral"), question(" negative")]
    assert differing(asked, ["positive ", "positive", "negative"]) == [(asked[1], "positive")]


def test_another_text_gets_the_instruction_of_the_test_rows() -> None:
    row = question("positive", "Classify the text. Answer with one of: a, b.\n\nOld text.\n\nIts second part.")
    assert like(row, "New text.") == [
        {"role": "user", "content": "Classify the text. Answer with one of: a, b.\n\nNew text."}
    ]


def test_documents_are_told_apart_however_they_are_broken_into_lines() -> None:
    assert list(documents('{\n "a": 1\n}\n{"b": "}{"}\n{"c": [2]}\n')) == [{"a": 1}, {"b": "}{"}, {"c": [2]}]
    assert list(documents("\n")) == []


def test_metrics_stand_beside_those_of_the_base_model() -> None:
    metrics = [{"name": "accuracy", "value": "0.71", "base": "0.4"}, {"name": "samples", "value": "420"}]
    lines = comparison({"metrics": metrics})
    assert lines[0].split()[-2:] == ["base", "tuned"]
    assert [line.split() for line in lines[1:]] == [["accuracy", "0.400", "0.710"], ["samples", "-", "420"]]


def test_the_chart_gets_the_images_of_this_checkout() -> None:
    images = {"operator": "tuneserve/operator:a1", "trainer": "tuneserve/trainer:b2", "server": "tuneserve/server:c3"}
    values = chart_values(images)
    assert values["image"] == {"repository": "tuneserve/operator", "tag": "a1", "pullPolicy": "Never"}
    assert values["images"] == {"trainer": "tuneserve/trainer:b2", "server": "tuneserve/server:c3"}

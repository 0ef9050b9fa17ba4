"""What counts as an answer, and what the figures are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneserve_pipeline.scores import match_label, normalise, score_classification, score_instruction, token_f1

LABELS = ("negative", "neutral", "positive")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        (" Positive.\n", "positive"),
        ('"neutral"', "neutral"),
        ("**NEGATIVE**", "negative"),
        ("“positive”", "positive"),
        ("`positive`", "positive"),
        ("positive, I think", None),
        ("The text is positive", None),
        ("positiv", None),
        ("", None),
        ("...", None),
    ],
)
def test_an_answer_is_a_label_or_none(answer: str, label: str | None) -> None:
    assert match_label(answer, LABELS) == label


@pytest.mark.parametrize(("answer", "label"), [("C", "C"), ("c++", "C++"), ("C#.", "C#"), ("-1", "-1"), ("1", "1")])
def test_signs_that_tell_labels_apart_count(answer: str, label: str) -> None:
    assert match_label(answer, ("C", "C++", "C#", "-1", "1")) == label


def test_labels_of_several_words_and_other_scripts() -> None:
    assert match_label("Very   Good!", ("very good", "bad")) == "very good"
    assert match_label("积极。", ("积极", "消极")) == "积极"


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise(text)
    assert match_label(once, (once,)) == once or not once.strip()


def test_figures_of_a_classification() -> None:
    scores = score_classification(
        expected=["negative", "negative", "neutral", "positive"],
        answers=["Negative", "positive", "hm", "positive"],
        labels=LABELS,
    )
    assert scores.metrics["accuracy"] == 0.5
    assert scores.metrics["invalidRatio"] == 0.25
    assert scores.metrics["samples"] == 4
    # F1: negative 2/3 (precision 1, recall 1/2), neutral 0, positive 2/3 (precision 1/2, recall 1)
    assert scores.metrics["macroF1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert scores.details["confusion"] == {
        "negative": {"negative": 1, "neutral": 0, "positive": 1},
        "neutral": {"negative": 0, "neutral": 0, "positive": 0},
        "positive": {"negative": 0, "neutral": 0, "positive": 1},
    }
    assert scores.details["invalid"] == {"negative": 0, "neutral": 1, "positive": 0}


def test_a_label_that_no_row_has_does_not_lower_the_mean() -> None:
    scores = score_classification(expected=["negative"], answers=["negative"], labels=LABELS)
    assert scores.metrics["macroF1"] == 1.0


def test_figures_of_instructions() -> None:
    scores = score_instruction(expected=["It is 3", "one two"], answers=["it is 3.", "one three"])
    assert scores.metrics == {"exactMatch": 0.5, "tokenF1": 0.75, "samples": 2.0}


@pytest.mark.parametrize(("want", "have", "f1"), [("", "", 1.0), ("a", "", 0.0), ("a a b", "a b b", 2 / 3)])
def test_overlap_of_words(want: str, have: str, f1: float) -> None:
    assert token_f1(want, have) == pytest.approx(f1)

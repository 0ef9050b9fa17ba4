"""Verdicts over measured values."""

import pytest

from tuneserve.api import Gate, Metric, Verdict
from tuneserve.finetune.gates import decimal_text, judge

METRICS = (Metric(name="accuracy", value="0.8000", base="0.5000"), Metric(name="invalidRatio", value="0.0250"))


@pytest.mark.parametrize(
    ("gates", "verdict", "reason"),
    [
        ([], Verdict.PASSED, None),
        ([{"metric": "accuracy", "atLeast": "0.8"}], Verdict.PASSED, None),
        ([{"metric": "accuracy", "atLeast": "8e-1"}], Verdict.PASSED, None),
        (
            [{"metric": "accuracy", "atLeast": "0.80001"}],
            Verdict.FAILED,
            "accuracy is 0.8000, must be at least 0.80001",
        ),
        ([{"metric": "invalidRatio", "atMost": "0.025"}], Verdict.PASSED, None),
        ([{"metric": "invalidRatio", "atMost": "0"}], Verdict.FAILED, "invalidRatio is 0.0250, must be at most 0"),
        ([{"metric": "accuracy", "export": "other", "atLeast": "0.9"}], Verdict.PASSED, None),
        (
            [{"metric": "accuracy", "export": "merged", "atLeast": "0.9"}, {"metric": "invalidRatio", "atMost": "0"}],
            Verdict.FAILED,
            "accuracy is 0.8000, must be at least 0.9; invalidRatio is 0.0250, must be at most 0",
        ),
        (
            [{"metric": "exactMatch", "atLeast": "0"}],
            Verdict.FAILED,
            "exactMatch is not measured by this task (measured: accuracy, invalidRatio)",
        ),
    ],
)
def test_verdicts(gates: list[dict[str, str]], verdict: Verdict, reason: str | None) -> None:
    parsed = [Gate.model_validate(gate) for gate in gates]
    assert judge(export="merged", metrics=METRICS, gates=parsed) == (verdict, reason)


def test_what_is_not_measured_is_neither_passed_nor_failed() -> None:
    gate = Gate.model_validate({"metric": "accuracy", "atLeast": "0"})
    assert judge(export="merged", metrics=(), gates=[gate]) == (Verdict.PENDING, None)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("accuracy", 1.0, "1.0000"), ("accuracy", 0.79996, "0.8000"), ("samples", 420.0, "420"), ("loss", 1e-9, "0.0000")],
)
def test_values_as_the_status_shows_them(name: str, value: float, text: str) -> None:
    assert decimal_text(name, value) == text

"""Whether an artifact may be served: its measured values against the gates. Pure, and cheap to do again.

Judged are the values as the status shows them, so that a user who compares the numbers comes to the same verdict.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal

from tuneserve.api import Gate, Metric, Verdict

#: Figures that count something, shown without decimals.
_COUNTS = frozenset({"samples"})


def decimal_text(name: str, value: float) -> str:
    """A measured value as the decimal string that the status shows."""
    return str(round(value)) if name in _COUNTS else f"{value:.4f}"


def judge(*, export: str, metrics: Iterable[Metric], gates: Iterable[Gate]) -> tuple[Verdict, str | None]:
    """The verdict over the artifact of one export, and the gates that do not hold with the values measured."""
    values = {metric.name: Decimal(metric.value) for metric in metrics}
    if not values:
        return Verdict.PENDING, None
    faults = [
        fault for gate in gates if gate.export in (None, export) and (fault := _fault(gate, values=values)) is not None
    ]
    return (Verdict.FAILED, "; ".join(faults)) if faults else (Verdict.PASSED, None)


def _fault(gate: Gate, *, values: Mapping[str, Decimal]) -> str | None:
    name = gate.metric.value
    value = values.get(name)
    if value is None:
        return f"{name} is not measured by this task (measured: {', '.join(sorted(values))})"
    if gate.at_least is not None and value < Decimal(gate.at_least):
        return f"{name} is {value}, must be at least {gate.at_least}"
    if gate.at_most is not None and value > Decimal(gate.at_most):
        return f"{name} is {value}, must be at most {gate.at_most}"
    return None

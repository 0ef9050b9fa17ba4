"""An adapter that no server takes is told before a GPU is."""

import pytest

from support.specs import finetune
from tuneserve.api import FineTune
from tuneserve.finetune.servability import fault

BOTH = [{"name": "merged", "format": "Merged"}, {"name": "small", "format": "Adapter"}]


def spec(**fields: object) -> object:
    return FineTune.model_validate(finetune(**fields)).spec


@pytest.mark.parametrize("architecture", ["FalconForCausalLM", "GPTJForCausalLM", "StableLmForCausalLM"])
def test_an_adapter_beside_a_base_that_takes_none(architecture: str) -> None:
    found = fault(spec(exports=BOTH), architecture=architecture)
    assert found is not None and found.stalled
    assert found.reason == "AdapterNotServable"
    assert found.message.startswith("spec.exports: small has the format Adapter")
    assert architecture in found.message and "export the format Merged instead" in found.message


@pytest.mark.parametrize(
    ("fields", "architecture"),
    [
        ({"exports": BOTH}, "LlamaForCausalLM"),
        ({"exports": BOTH}, "GPTNeoXForCausalLM"),
        ({"exports": BOTH}, ""),  # prepared before architectures were told
        ({"exports": BOTH[:1]}, "FalconForCausalLM"),
        ({"exports": BOTH[1:], "method": "PromptTuning"}, "FalconForCausalLM"),  # never served, measured all the same
    ],
)
def test_what_can_be_served_or_is_not_to_be(fields: dict[str, object], architecture: str) -> None:
    assert fault(spec(**fields), architecture=architecture) is None

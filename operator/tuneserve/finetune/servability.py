"""Whether what a FineTune is to put out can be served; what its spec alone tells, the API server says. Pure."""

from tuneserve.api import ExportFormat, FineTuneSpec
from tuneserve.finetune.failures import Finding
from tuneserve.finetune.specs import LORA_METHODS

#: Architectures that vLLM serves, but never with LoRA adapters beside them.
WITHOUT_LORA = frozenset({"FalconForCausalLM", "GPTJForCausalLM", "StableLmForCausalLM"})


def fault(spec: FineTuneSpec, *, architecture: str) -> Finding | None:
    """Why an adapter of such a base model could not be served; an empty architecture is not known."""
    adapters = [export.name for export in spec.exports if export.format is ExportFormat.ADAPTER]
    if not adapters or spec.method not in LORA_METHODS or architecture not in WITHOUT_LORA:
        return None
    return Finding(
        reason="AdapterNotServable",
        message=f"spec.exports: {adapters[0]} has the format Adapter, and vLLM serves no adapters beside a "
        f"{architecture}, which the base model is: export the format Merged instead",
    )

"""Loss and gradients of packed batches: warm-up, memory, CUDA graphs.

Every batch has a fixed shape, filled up with rows that carry no label, so that forward and backward are launched as one
graph. Writes the gradients of the PEFT parameters; changes no parameter itself.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuneserve_pipeline.packed import weights
from tuneserve_pipeline.packed.kernels import TILE
from tuneserve_pipeline.packed.layer import LabelledLoss, decoder_layer, loss_piece, rms_norm

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]

#: Logits that exist at once, at most (elements): 256 MiB in fp32.
_LOGITS = 2**26
#: Bytes that stay free: the optimizer's first step, evaluation, fragmentation; 0.7 GiB of them were taken on a 7B.
_MARGIN = 3 * 2**29
_WARM_UPS = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Fixed shapes of a batch."""

    tokens: int
    labels: int


class PackedEngine:
    def __init__(self, model: nn.Module, *, longest: int) -> None:
        """`model`: one that `weights.unsupported` has nothing against, with its adapters."""
        base: Any = model.get_base_model()  # type: ignore[operator]
        self.device: torch.device = base.get_input_embeddings().weight.device
        self.shape = weights.shape_of(model)
        self.model = weights.fuse(model)
        self.layers = self.model.layers
        self.cos, self.sin = weights.rotary_tables(model, longest=longest, device=self.device)
        self.embedding: Tensor = base.get_input_embeddings().weight.detach()
        self.head: Tensor = base.get_output_embeddings().weight.detach()
        self.norm: Tensor = base.model.norm.weight.detach().to(torch.bfloat16)
        self.loss = torch.zeros((), device=self.device)
        self.checkpointed = 0
        self._cuda = self.device.type == "cuda"
        self._graph: Any = None
        self._given: dict[str, Tensor] = {}
        self._refresh: Any = None
        self._layer: Any = partial(decoder_layer, self.shape)
        self._piece: Any = loss_piece
        if self._cuda:
            _prepare_compiler()
            self._layer = torch.compile(self._layer, dynamic=False)
            self._piece = torch.compile(self._piece, dynamic=False)

    # --- what the trainer calls ----------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Takes over the parameters as the optimizer left them, and clears the gradients."""
        if self._refresh is None:
            self._begin()
        else:
            self._refresh.replay()

    def accumulate(self, batch: Batch) -> None:
        """Adds the batch's gradients and its loss to those of the step."""
        if not self._cuda:
            self._accumulate(batch)
            return
        if self._graph is None:
            self._capture(batch)
        for name, value in self._given.items():
            value.copy_(batch[name], non_blocking=True)
        self._graph.replay()

    def end_step(self) -> Tensor:
        """Sets the gradients of the parameters; returns the loss of the step."""
        for adapters in self.model.adapters:
            for part in adapters.parts:
                part.set_gradients()
        return self.loss.clone()

    # --- the computation -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        for adapters in self.model.adapters:
            adapters.refresh()
            adapters.clear_gradients()
        for layer in self.layers:
            for linear in layer.linears:
                linear.refresh()
        self.loss.zero_()

    def forward(self, batch: Batch) -> Tensor:
        x = self.embedding[batch["ids"]].to(torch.bfloat16).requires_grad_()
        cos, sin = self.cos[batch["positions"]][:, None], self.sin[batch["positions"]][:, None]
        for index, layer in enumerate(self.layers):
            given = (x, cos, sin, batch["begins"], batch["ends"], *layer.flat())
            if index < self.checkpointed:
                x = checkpoint(self._layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self._layer(*given)
        x = rms_norm(x.index_select(0, batch["places"]), self.norm, self.shape.eps)
        size = max(64, _LOGITS // self.head.shape[0])
        return LabelledLoss.apply(x, batch["labels"], self.head, batch["weight"], self._piece, size)  # type: ignore[no-any-return]

    def _accumulate(self, batch: Batch) -> None:
        loss = self.forward(batch)
        leaves = [leaf for adapters in self.model.adapters for leaf in (*adapters.a, *adapters.b)]
        found = iter(torch.autograd.grad(loss, leaves))
        for adapters in self.model.adapters:
            das, dbs = ([next(found) for _ in some] for some in (adapters.a, adapters.b))
            adapters.add_gradients(das, dbs)
        self.loss += loss.detach()

    # --- memory and graphs ---------------------------------------------------------------------------------------

    def _capture(self, batch: Batch) -> None:
        """Of the first batch; all others have its shape."""
        self._given = {name: value.to(self.device) for name, value in batch.items()}
        parts = [part for adapters in self.model.adapters for part in adapters.parts]
        sums = [self.loss, *(each for part in parts for each in (part.da, part.db))]
        saved = [each.clone() for each in sums]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._fit(self._given)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._graph, self._refresh = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._accumulate(self._given)
        with torch.cuda.graph(self._refresh, pool=self._graph.pool(), stream=stream):
            self._begin()
        # What the tries have added is no part of the step.
        for value, before in zip(sums, saved, strict=True):
            value.copy_(before)

    def _warm_up(self, batch: Batch) -> None:
        for _ in range(_WARM_UPS):
            self._accumulate(batch)
        torch.cuda.synchronize()

    def _fit(self, batch: Batch) -> None:
        """As few layers computed twice as fit, then as many kept unpacked as fit beside them."""
        while True:
            try:
                torch.cuda.reset_peak_memory_stats()
                self._warm_up(batch)
                if self._spare() >= 0 or self.checkpointed == len(self.layers):
                    break
            except torch.OutOfMemoryError:
                if self.checkpointed == len(self.layers):
                    raise
            # Outside of the handler, which holds the frames of the failed try.
            torch.cuda.empty_cache()
            self.checkpointed = min(len(self.layers), self.checkpointed + max(2, len(self.layers) // 8))
            log.info("activations do not fit: %d of %d layers are computed twice", self.checkpointed, len(self.layers))
        kept = 0
        spare = self._spare()
        for layer in self.layers:
            needed = sum(linear.unpacked_bytes for linear in layer.linears)
            if self.checkpointed or spare < needed:
                break
            for linear in layer.linears:
                linear.keep_unpacked()
            spare -= needed
            kept += 1
        if kept:
            self._warm_up(batch)
        log.info("%d layers are computed twice, %d kept unpacked", self.checkpointed, kept)

    def _spare(self) -> int:
        total = torch.cuda.get_device_properties(self.device).total_memory
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        # The optimizer has two moments of each parameter, from its first step on.
        moments = 2 * sum(each.numel() * 4 for each in self.model.parameters)
        return allowed - torch.cuda.max_memory_reserved() - moments - _MARGIN


def limits_of(packs: Sequence[tuple[int, int]]) -> Limits:
    """The shape that all packs of (tokens, labels) fit into, in whole tiles."""
    tokens, labels = (-(-max(pack[place] for pack in packs) // TILE) * TILE for place in range(2))
    return Limits(tokens=tokens, labels=labels)


def _prepare_compiler() -> None:
    import torch._dynamo
    import torch._functorch.config as functorch

    # Never compute a layer's activations twice by the compiler's own wish: products are worth more than memory here.
    functorch.ban_recompute_used_far_apart = False
    functorch.ban_recompute_long_fusible_chains = False
    functorch.ban_recompute_materialized_backward = False
    torch._dynamo.config.recompile_limit = 64

"""What the backward pass computes again instead of keeping it: memory for time, block by block."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pixelflow_engine.model import PackedTransformer

Recompute = Literal["nothing", "pointwise", "blocks"]


def recompute(model: PackedTransformer, what: Recompute) -> None:
    """Have a model's blocks keep less for their backward pass, in place; no number changes.

    Args:
        model: its blocks, compiled or not.
        what: ``nothing``; ``pointwise``, all but matrix products and attention, which take most of the time and a
            fraction of the memory; ``blocks``, all but a block's input.
    """
    if what == "nothing":
        return
    # Nothing is drawn in a block; to look after a GPU's random state would end the capture of a graph.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "pointwise":
        options["context_fn"] = _keeping_products
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _keeping_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: object, operation: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    # By name: there is an attention operation for each backend and device, torch's among them.
    name = operation.name()
    product = name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return CheckpointPolicy.MUST_SAVE if product or "attention" in name else CheckpointPolicy.PREFER_RECOMPUTE

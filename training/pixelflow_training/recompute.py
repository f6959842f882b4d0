"""Activation checkpointing, block by block: the backward pass recomputes what is not stored."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pixelflow_engine.model import PackedTransformer

Recompute = Literal["nothing", "pointwise", "blocks"]


def recompute(model: PackedTransformer, what: Recompute) -> None:
    """Make a model's blocks store less for the backward pass, in place; no number changes.

    Args:
        model: the model; its blocks may be compiled.
        what: ``nothing``; ``pointwise`` recomputes everything but matrix products and attention, which take most of the
            time and a fraction of the memory; ``blocks`` stores only the input of a block.
    """
    if what == "nothing":
        return
    # Blocks draw no random numbers, and saving a GPU's random state would abort the capture of a graph.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "pointwise":
        options["context_fn"] = _keeping_products
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _keeping_products() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: object, operation: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    # Matched by name, because each backend and device has its own attention operation, torch included.
    name = operation.name()
    product = name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return CheckpointPolicy.MUST_SAVE if product or "attention" in name else CheckpointPolicy.PREFER_RECOMPUTE

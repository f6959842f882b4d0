"""Compilation of a model's blocks: one compiled function serves all, which keeps the first call short."""

from __future__ import annotations

import inspect
from functools import partial
from types import FunctionType
from typing import Any

import torch

from .model import PackedTransformer, TransformerBlock
from .traceable import KnownPackOperations

MOST_GRAPHS = 64
"""Maximum number of graphs per model, one for each kind of block arguments; exceeding it is an error."""


def compile_blocks(model: PackedTransformer) -> None:
    """Make all blocks of a model run one compiled function, in place.

    Args:
        model: a model whose operations are already final.
    """
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": MOST_GRAPHS} if "recompile_limit" in known else {}
    if isinstance(model.operations, KnownPackOperations):
        options["dynamic"] = False
    compiled = torch.compile(_own_copy(TransformerBlock.forward), fullgraph=True, **options)
    for block in model.blocks:
        block.forward = partial(compiled, block)  # type: ignore[method-assign]


def _own_copy(function: Any) -> FunctionType:
    """Copy a function with its own code object: torch counts and limits graphs per code object, across all models."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

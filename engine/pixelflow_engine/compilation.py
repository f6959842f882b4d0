"""Compilation of a model's blocks: one of them serves all, so the first image comes soon."""

from __future__ import annotations

import inspect
from functools import partial
from types import FunctionType
from typing import Any

import torch

from .model import PackedTransformer, TransformerBlock
from .traceable import KnownPackOperations

MOST_GRAPHS = 64
"""Of one model: for each of its blocks' kinds of arguments there is one. A model that meets more has an error."""


def compile_blocks(model: PackedTransformer) -> None:
    """Have every block of a model run one compiled function, in place.

    Args:
        model: with the operations that it will run.
    """
    known = inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": MOST_GRAPHS} if "recompile_limit" in known else {}
    if isinstance(model.operations, KnownPackOperations):
        options["dynamic"] = False
    compiled = torch.compile(_own_copy(TransformerBlock.forward), fullgraph=True, **options)
    for block in model.blocks:
        block.forward = partial(compiled, block)  # type: ignore[method-assign]


def _own_copy(function: Any) -> FunctionType:
    """The same function with code of its own: graphs are kept, and their number limited, by code, for all models."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

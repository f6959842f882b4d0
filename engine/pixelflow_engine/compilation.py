"""Compilation of a model's blocks: one of them serves all, so the first image comes soon."""

from __future__ import annotations

import inspect
from functools import partial
from types import FunctionType
from typing import Any

import torch

from .model import PackedTransformer, TransformerBlock

MOST_GRAPHS = 64
"""Of one model: for each of its blocks' kinds of arguments there is one. A model that meets more has an error."""


def compile_blocks(model: PackedTransformer) -> None:
    """Have every block of a model run one compiled function, in place."""
    known = inspect.signature(torch.compile).parameters
    limit: dict[str, Any] = {"recompile_limit": MOST_GRAPHS} if "recompile_limit" in known else {}
    compiled = torch.compile(_own_copy(TransformerBlock.forward), fullgraph=True, **limit)
    for block in model.blocks:
        block.forward = partial(compiled, block)  # type: ignore[method-assign]


def _own_copy(function: Any) -> FunctionType:
    """The same function with code of its own: graphs are kept, and their number limited, by code, for all models."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy

"""Checks at the door that several operations share: every refusal names the argument, what came and what was expected.

What only one operation asks for is checked in its own ``op.py``. The updates of a solver are stricter (contiguous,
without gradients) and have theirs in ``ode_step/checks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import PackedLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_dtype(name: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """One of these types."""
    if dtype not in dtypes:
        raise ValueError(f"{name}: got {dtype}, expected one of {', '.join(str(t) for t in dtypes)}")


def check_dense(name: str, x: Tensor) -> None:
    """Of one of the four types; channels, the last dimension, side by side."""
    check_dtype(name, x.dtype)
    if x.shape[0] > 0 and x.stride(-1) != 1:
        raise ValueError(f"{name}: got channel stride {x.stride(-1)}, expected dense channels (1)")


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """On the device of another tensor."""
    if x.device != other.device:
        raise ValueError(f"{name}: got device {x.device}, expected that of {other_name} ({other.device})")


def check_weight(name: str, weight: Tensor, width: int) -> None:
    """A norm's weight: ``[C]``, dense."""
    if tuple(weight.shape) != (width,):
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected ({width},)")
    check_dense(name, weight)


def check_eps(eps: float) -> None:
    """Not negative, and a number."""
    if not eps >= 0:  # nor NaN
        raise ValueError(f"eps: got {eps}, expected 0 or more")


def check_num_tokens(name: str, x: Tensor, layout: PackedLayout) -> None:
    """As many tokens as the layout has."""
    if x.shape[0] != layout.num_tokens:
        raise ValueError(f"{name}: got {x.shape[0]} tokens, expected the layout's {layout.num_tokens}")

"""Argument checks shared by several operations. Every error names the argument, what was given and what was expected.

Requirements of a single operation are checked in its own ``op.py``. The solver updates are stricter (contiguous
tensors, no gradients) and have their own checks in ``ode_step/checks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .packing import PackedLayout

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_dtype(name: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Require one of ``dtypes``."""
    if dtype not in dtypes:
        raise ValueError(f"{name}: got {dtype}, expected one of {', '.join(str(t) for t in dtypes)}")


def check_dense(name: str, x: Tensor) -> None:
    """Require one of the four dtypes of ``DTYPES`` and contiguous channels (last dimension, stride 1)."""
    check_dtype(name, x.dtype)
    if x.shape[0] > 0 and x.stride(-1) != 1:
        raise ValueError(f"{name}: got channel stride {x.stride(-1)}, expected dense channels (1)")


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Require ``x`` to be on the device of ``other``."""
    if x.device != other.device:
        raise ValueError(f"{name}: got device {x.device}, expected that of {other_name} ({other.device})")


def check_weight(name: str, weight: Tensor, width: int) -> None:
    """Require a norm's weight to be ``[C]`` and dense."""
    if tuple(weight.shape) != (width,):
        raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected ({width},)")
    check_dense(name, weight)


def check_eps(eps: float) -> None:
    """Require a non-negative number."""
    if not eps >= 0:  # also true for NaN
        raise ValueError(f"eps: got {eps}, expected 0 or more")


def check_num_tokens(name: str, x: Tensor, layout: PackedLayout) -> None:
    """Require as many tokens as the layout has."""
    if x.shape[0] != layout.num_tokens:
        raise ValueError(f"{name}: got {x.shape[0]} tokens, expected the layout's {layout.num_tokens}")

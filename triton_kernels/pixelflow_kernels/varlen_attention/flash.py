"""FlashAttention's varlen function: from the package ``flash_attn`` if available, else PyTorch's own copy."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

PLACES = (("flash_attn", "flash_attn_varlen_func"), ("torch.nn.attention.varlen", "varlen_attn"))


@cache
def _function() -> tuple[str, Callable[..., Any]] | None:
    """Find the module and its function; None if there is none.

    It is not enough that the module imports: other packages use the name ``flash_attn`` too, and the module may be
    installed without its binary part.
    """
    for module, name in PLACES:
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, OSError):
            continue
        if callable(function):
            return module, function
    return None


def _found() -> tuple[str, str, str | None] | None:
    """Return the names of the module, of its function and of the scale, None if the function takes none."""
    found = _function()
    if found is None:
        return None
    module, function = found
    scale = "softmax_scale" if module == "flash_attn" else "scale"
    return module, dict(PLACES)[module], scale if scale in inspect.signature(function).parameters else None


# Dynamo can trace neither imports nor signatures, so it calls this and keeps the result. This is all that
# torch.compiler.assume_constant_result does, but calling that would import torch._dynamo for those who never compile.
_found._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(dtype: torch.dtype) -> str | None:
    """Return why FlashAttention cannot take CUDA tensors of this dtype, or None if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if _found() is None:
        return "no importable " + " nor ".join(f"{module}.{name}" for module, name in PLACES)
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> Tensor:
    """Compute the output ``[T, H, D]``, differentiable by the library's own backward.

    Raises:
        RuntimeError: this version of PyTorch's function accepts no scale, and ``softmax_scale`` is not its default.
    """
    found = _found()
    assert found is not None, "why_not has been asked"
    module, name, scale = found
    function = getattr(sys.modules[module], name)
    # The names of the first seven arguments changed between versions; their order did not.
    arguments = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if scale is not None:
        return function(*arguments, **{scale: softmax_scale})
    if not math.isclose(softmax_scale, q.shape[-1] ** -0.5, rel_tol=1e-6):
        raise RuntimeError(f"softmax_scale: got {softmax_scale}, but {module} of torch {torch.__version__} has none")
    return function(*arguments)

"""Public function: validation, registration of the implementations, and autograd.

``backend="triton"`` is a custom operation with a CUDA implementation (``forward``, ``backward``) and a CPU one
(``reference``). ``backend="torch"`` is a separate custom operation, because it reads the members' lengths on the host
and must nevertheless be a single node of a compiled graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.checks import check_device, check_dtype
from pixelflow_kernels.registration import launched_by

from . import backends, flash, reference, sdpa

MAX_HEAD_DIM = 256


# --- public function ---------------------------------------------------------------------------------------


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    *,
    backend: str = "auto",
    multiple_of: int = 1,
) -> Tensor:
    """Compute softmax attention of each member's queries to the keys of the same member.

    A member is one sequence of the pack; attention never crosses members. For self-attention ``cu_seqlens_q`` and
    ``cu_seqlens_k`` are the same; for cross-attention the keys have their own lengths. Differentiable in q, k and v,
    with the same bits in every run (for ``backend="flash"``, if the library guarantees it). A member without keys has
    output 0 and passes on no gradient. On CUDA nothing is read back to the host, except by ``backend="torch"``.

    Args:
        q: ``[T, H, D]`` bf16, fp16, fp32 or fp64. The heads of a token are dense (strides D and 1) and the token stride
            is arbitrary, so slices of a fused projection are read in place. D is a multiple of 8, at most 256; any
            number with ``backend="torch"``.
        k, v: ``[L, H, D]``, likewise, in the dtype of q.
        cu_seqlens_q: ``[n + 1]`` int32, non-decreasing from 0 to T: member i has the queries ``cu_seqlens_q[i]`` up to,
            but not including, ``cu_seqlens_q[i + 1]``.
        cu_seqlens_k: ``[n + 1]`` int32, the same for the keys, up to L.
        max_seqlen_q, max_seqlen_k: upper bounds of the members' numbers of queries and keys.
        softmax_scale: factor of the logits, positive; default ``1 / sqrt(D)``.
        backend: ``triton``, ``flash`` (FlashAttention: the package, else PyTorch's copy) or ``torch`` (PyTorch's
            attention for each member). ``auto`` is ``triton`` on CUDA, and ``torch`` on a CPU or for float64.
        multiple_of: a promise that every length of queries and of keys is a multiple of this number, so that tiles that
            divide it need no masks. ``PackedLayout.multiple_of`` provides it without reading from a device.

    The values of ``cu_seqlens_q`` and ``cu_seqlens_k`` and the promises about them are validated only where they are
    read on the host: on a CPU, and with ``backend="torch"``. Elsewhere this would stall the host; invalid values then
    give wrong results, leave results unwritten, or cause reads and writes outside the tensors.

    Returns:
        ``[T, H, D]`` in the dtype of q, contiguous (with ``backend="flash"``, as the library returns it).

    Raises:
        ValueError: a shape, dtype, device, stride or number does not meet the requirements above; the message names it.
        BackendUnavailableError: the named backend cannot run here; the message says why.

    Source: arXiv 2504.07963, section 3.3.
    """
    _check_tokens(q, k, v, any_head_dim=backend == "torch")
    _check_members("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q, cu_seqlens_q)
    _check_members("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k, cu_seqlens_q)
    if multiple_of < 1:
        raise ValueError(f"multiple_of: got {multiple_of}, expected 1 or more")
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"softmax_scale: got {softmax_scale}, expected a positive number")
    chosen = backends.choose(backend, q)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if chosen == "triton":
        return _varlen_attention(q, k, v, *lengths, scale, multiple_of)[0]
    if chosen == "torch" or q.shape[0] == 0 or k.shape[0] == 0:  # FlashAttention takes no empty tensors
        return _varlen_attention_torch(q, k, v, *lengths, scale, multiple_of)
    return flash.attention(q, k, v, *lengths, scale)


# --- validation --------------------------------------------------------------------------------------------


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, any_head_dim: bool) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected three dimensions [T, H, D]")
        check_dtype(name, x.dtype)
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, expected the type of q ({q.dtype})")
        check_device(name, x, "q", q)
        heads, head_dim = x.shape[1:]
        if x.shape[1:] != q.shape[1:]:
            expected = f"those of q ({q.shape[1]}, {q.shape[2]})"
            raise ValueError(f"{name}: got heads and head dim ({heads}, {head_dim}), expected {expected}")
        if x.shape[0] > 0 and (x.stride(2) != 1 or (heads > 1 and x.stride(1) != head_dim)):
            raise ValueError(f"{name}: got strides {x.stride()}, expected the heads of a token dense ({head_dim}, 1)")
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"v: got {v.shape[0]} tokens, expected as many as k has ({k.shape[0]})")
    if q.shape[1] < 1:
        raise ValueError("q: got no heads, expected one or more")
    if q.shape[2] < 1 or (not any_head_dim and (q.shape[2] % 8 != 0 or q.shape[2] > MAX_HEAD_DIM)):
        raise ValueError(f"head dim: got {q.shape[2]}, expected a multiple of 8, from 8 to {MAX_HEAD_DIM}")


def _check_members(name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int, x: Tensor, other: Tensor) -> None:
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: got shape {tuple(cu_seqlens.shape)}, expected [n + 1]")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name}: got {cu_seqlens.dtype}, expected torch.int32")
    check_device(name, cu_seqlens, "q", x)
    if cu_seqlens.shape != other.shape:
        raise ValueError(f"{name}: got {cu_seqlens.shape[0]} entries, expected as many as cu_seqlens_q ({len(other)})")
    if cu_seqlens.shape[0] > 1 and cu_seqlens.stride(0) != 1:
        raise ValueError(f"{name}: got stride {cu_seqlens.stride(0)}, expected a contiguous tensor")
    members = cu_seqlens.shape[0] - 1
    if max_seqlen < 0 or x.shape[0] > members * max_seqlen:
        raise ValueError(f"{max_name}: got {max_seqlen}, but {members} members have {x.shape[0]} tokens together")


def _check_values(name: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int, multiple_of: int) -> None:
    """Validate the values of ``cu_seqlens``; on CUDA this would synchronise with the device."""
    lengths = cu_seqlens.diff()
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens or bool((lengths < 0).any()):
        raise ValueError(f"{name}: got {_shown(cu_seqlens)}, expected it to rise from 0 to {tokens}")
    if bool((lengths > max_seqlen).any()):
        longest = int(lengths.max())
        raise ValueError(f"max_seqlen{name.removeprefix('cu_seqlens')}: got {max_seqlen}, a member has {longest}")
    if bool((lengths % multiple_of != 0).any()):
        raise ValueError(f"multiple_of: got {multiple_of}, but {name} has the lengths {_shown(lengths)}")


def _shown(x: Tensor) -> str:
    values = [str(n) for n in x[:8].tolist()]
    return f"[{', '.join(values)}{', ...' if x.shape[0] > 8 else ''}]"


def _check_all_values(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    multiple_of: int,
) -> None:
    _check_values("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, multiple_of)
    _check_values("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k, multiple_of)


# --- the operation -----------------------------------------------------------------------------------------


def _as_given(q: Tensor) -> torch.autocast:
    """Disable the caller's autocast, which also applies inside an operation and would change dtypes and bits."""
    return torch.autocast(q.device.type, enabled=False)


@custom_op("pixelflow::varlen_attention", mutates_args=(), device_types="cpu")
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> tuple[Tensor, Tensor]:
    _check_all_values(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, multiple_of)
    with _as_given(q):
        return reference.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


@launched_by(_varlen_attention)
def _launch_varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> tuple[Tensor, Tensor]:
    from .forward import launch_forward

    out, lse = q.new_empty(q.shape), _new_lse(q)
    launch_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, max_seqlen_q, softmax_scale, multiple_of)
    return out, lse


@_varlen_attention.register_fake
def _fake_varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _new_lse(q)


@custom_op("pixelflow::varlen_attention_backward", mutates_args=(), device_types="cpu")
def _varlen_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with _as_given(q):
        return reference.attention_backward(grad, grad_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


@launched_by(_varlen_attention_backward)
def _launch_varlen_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from .backward import launch_backward

    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # Gradients may be expanded or transposed.
    dense = grad.stride(2) == 1 and (grad.shape[1] == 1 or grad.stride(1) == grad.shape[2])
    grad = grad if dense else grad.contiguous()
    if grad_lse is not None and grad_lse.stride(1) != 1:
        grad_lse = grad_lse.contiguous()
    launch_backward(
        grad,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        dq,
        dk,
        dv,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        multiple_of,
    )
    return dq, dk, dv


@_varlen_attention_backward.register_fake
def _fake_varlen_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)  # the log-sum-exp rarely has a gradient


def _gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        grad = torch.zeros_like(ctx.saved_tensors[0])
    return *_varlen_attention_backward(grad, grad_lse, *ctx.saved_tensors, *ctx.numbers), *[None] * 6


_varlen_attention.register_autograd(_gradients, setup_context=_save)


# --- PyTorch's attention -----------------------------------------------------------------------------------


@custom_op("pixelflow::varlen_attention_torch", mutates_args=())
def _varlen_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> Tensor:
    _check_all_values(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, multiple_of)
    with _as_given(q):
        return sdpa.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


@_varlen_attention_torch.register_fake
def _fake_varlen_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int,
) -> Tensor:
    return q.new_empty(q.shape)


@custom_op("pixelflow::varlen_attention_torch_backward", mutates_args=())
def _varlen_attention_torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with _as_given(q):
        return reference.attention_backward(grad, None, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)


@_varlen_attention_torch_backward.register_fake
def _fake_varlen_attention_torch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_torch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, _, ctx.softmax_scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _torch_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_varlen_attention_torch_backward(grad, *ctx.saved_tensors, ctx.softmax_scale), *[None] * 6


_varlen_attention_torch.register_autograd(_torch_gradients, setup_context=_save_torch)

"""Public functions: validation, registration of the implementations, and autograd.

Each call is one custom operation with a CPU implementation (``reference``) and a CUDA one (``rotation``, ``forward``,
``backward``, imported on first use because Triton is not installed everywhere).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.checks import check_dense, check_device, check_eps, check_num_tokens, check_weight
from pixelflow_kernels.packing import PackedLayout
from pixelflow_kernels.registration import launched_by

from . import reference

# --- public functions --------------------------------------------------------------------------------------


def rotation_table(layout: PackedLayout, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tabulate the cosine and sine of every rotation angle of a layout, side by side.

    Args:
        layout: the pack; the table has ``P = layout.max_position`` rows.
        head_dim: ``D``, a multiple of 8.
        dtype: dtype in which the rotation is computed: float32, or float64 for float64 tokens.

    Returns:
        ``[P, D / 2]``; row p holds ``cos(p theta_0), sin(p theta_0), cos(p theta_1), ...`` with
        ``theta_j = 10000^(-2j / (D/2))``.

    Raises:
        ValueError: ``head_dim`` is not a positive multiple of 8.

    Source: arXiv 2504.07963, section 3.3.
    """
    _check_head_dim(head_dim)
    device = layout.row.device
    exponent = 2 * torch.arange(head_dim // 4, dtype=dtype, device=device) / (head_dim // 2)
    theta = 1.0 / torch.pow(torch.full((), 10000.0, dtype=dtype, device=device), exponent)
    angles = torch.arange(layout.max_position, dtype=dtype, device=device)[:, None] * theta
    return torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1).flatten(-2)


def rope2d(x: Tensor, layout: PackedLayout, *, table: Tensor | None = None) -> Tensor:
    """Rotate each head's channel pairs by the token's position: the first half by column, the second half by row.

    The result has the bits of eager PyTorch: every product and sum rounds separately (level A).

    Args:
        x: ``[T, H, D]`` bf16, fp16, fp32 or fp64; a token's channels are dense, the token stride is arbitrary.
        layout: positions of the ``T`` tokens.
        table: ``rotation_table(layout, D)`` in float32 (float64 for float64 tokens); computed if not given.

    Returns:
        ``[T, H, D]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.3.
    """
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected three dimensions [T, H, D]")
    if x.shape[1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least one head")
    table = _check_tokens("x", x, layout, x.shape[2], table)
    if x.shape[0] > 0 and x.shape[1] > 1 and x.stride(1) != x.shape[2]:
        raise ValueError(f"x: got head stride {x.stride(1)}, expected heads side by side ({x.shape[2]})")
    return _rope2d(x, layout.row, layout.column, table, False)


def qk_norm_rope2d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    layout: PackedLayout,
    *,
    num_heads: int,
    eps: float = 1e-6,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply RMSNorm to q and to k over all heads together, then 2-D RoPE to both, for self-attention.

    ``rms(x) = weight * x / sqrt(mean(x^2) + eps)`` is computed in float32 (float64 for float64 tokens) and rounded to
    the dtype of ``x``; so is the rotation. Differentiable once in q, k and both weights.

    Args:
        q, k: ``[T, C]`` bf16, fp16, fp32 or fp64, of the same dtype. A token's channels are dense and the token stride
            is arbitrary, so slices of a fused ``[T, 3C]`` projection are read in place.
        q_weight, k_weight: ``[C]``, any of these dtypes.
        layout: positions of the ``T`` tokens.
        num_heads: ``H``; ``D = C / H`` must be a multiple of 8.
        eps: added to the mean square.
        table: ``rotation_table(layout, D)`` in float32 (float64 for float64 tokens); computed if not given.

    Returns:
        q and k as ``[T, H, D]``, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.3.
    """
    head_dim = _check_norm(q, k, q_weight, k_weight, num_heads, eps)
    table = _check_tokens("q", q, layout, head_dim, table)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: got {k.shape[0]} tokens, expected as many as q has ({q.shape[0]})")
    return _norm_rope2d(q, k, q_weight, k_weight, layout.row, layout.column, table, num_heads, eps, True)


def norm_rope2d_q_norm_k(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    layout: PackedLayout,
    *,
    num_heads: int,
    eps: float = 1e-6,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply RMSNorm to q and to k over all heads together, then 2-D RoPE to q only, for cross-attention.

    Like :func:`qk_norm_rope2d`, except that ``k [L, C]`` holds text tokens, whose number ``L`` is independent of ``T``
    and which have no position.
    """
    head_dim = _check_norm(q, k, q_weight, k_weight, num_heads, eps)
    table = _check_tokens("q", q, layout, head_dim, table)
    return _norm_rope2d(q, k, q_weight, k_weight, layout.row, layout.column, table, num_heads, eps, False)


# --- validation --------------------------------------------------------------------------------------------


def _check_head_dim(head_dim: int) -> None:
    if head_dim <= 0 or head_dim % 8 != 0:
        raise ValueError(f"head dim: got {head_dim}, expected a positive multiple of 8")


def _check_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, num_heads: int, eps: float) -> int:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected two dimensions [T, C]")
        check_dense(name, x)
    width = q.shape[1]
    if k.shape[1] != width:
        raise ValueError(f"k: got width {k.shape[1]}, expected that of q ({width})")
    if k.dtype != q.dtype:
        raise ValueError(f"k: got {k.dtype}, expected the type of q ({q.dtype})")
    if num_heads <= 0 or width % num_heads != 0:
        raise ValueError(f"num_heads: got {num_heads}, expected a divisor of the width {width}")
    _check_head_dim(width // num_heads)
    check_eps(eps)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_weight(name, weight, width)
    for name, x in (("k", k), ("q_weight", q_weight), ("k_weight", k_weight)):
        check_device(name, x, "q", q)
    return width // num_heads


def _check_tokens(name: str, x: Tensor, layout: PackedLayout, head_dim: int, table: Tensor | None) -> Tensor:
    """Validate ``x`` against the layout and return the rotation table, which is computed if not given."""
    _check_head_dim(head_dim)
    check_dense(name, x)
    check_num_tokens(name, x, layout)
    check_device("layout", layout.row, name, x)
    high_type = torch.promote_types(x.dtype, torch.float32)
    if table is None:
        return rotation_table(layout, head_dim, high_type)
    if table.ndim != 2 or table.shape[1] != head_dim // 2 or table.shape[0] < layout.max_position:
        expected = f"[at least {layout.max_position}, {head_dim // 2}]"
        raise ValueError(f"table: got shape {tuple(table.shape)}, expected {expected}")
    if table.dtype != high_type or table.device != x.device or not table.is_contiguous():
        got = f"{table.dtype} on {table.device}{'' if table.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"table: got {got}, expected contiguous {high_type} on {x.device}")
    return table


# --- the rotation alone ------------------------------------------------------------------------------------


@custom_op("pixelflow::rope2d", mutates_args=(), device_types="cpu")
def _rope2d(x: Tensor, row: Tensor, column: Tensor, table: Tensor, conjugate: bool) -> Tensor:
    return reference.rotate(x, row, column, table, conjugate)


@launched_by(_rope2d)
def _launch_rope2d(x: Tensor, row: Tensor, column: Tensor, table: Tensor, conjugate: bool) -> Tensor:
    from .rotation import launch_rotate

    out = x.new_empty(x.shape)
    launch_rotate(_dense(x.flatten(1)), row, column, table, out.flatten(1), x.shape[2], conjugate)
    return out


@_rope2d.register_fake
def _fake_rope2d(x: Tensor, row: Tensor, column: Tensor, table: Tensor, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save_rope2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, row, column, table, ctx.conjugate = inputs
    ctx.save_for_backward(row, column, table)


def _rope2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The transpose of a rotation is the rotation by the negative angle.
    return _rope2d(grad, *ctx.saved_tensors, not ctx.conjugate), None, None, None, None


_rope2d.register_autograd(_rope2d_backward, setup_context=_save_rope2d)


# --- norm and rotation -------------------------------------------------------------------------------------


@custom_op("pixelflow::norm_rope2d", mutates_args=(), device_types="cpu")
def _norm_rope2d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    num_heads: int,
    eps: float,
    rotate_k: bool,
) -> tuple[Tensor, Tensor]:
    q_out = reference.rms_norm(q, q_weight, eps, table.dtype).unflatten(-1, (num_heads, -1))
    k_out = reference.rms_norm(k, k_weight, eps, table.dtype).unflatten(-1, (num_heads, -1))
    q_out = reference.rotate(q_out, row, column, table)
    return q_out, reference.rotate(k_out, row, column, table) if rotate_k else k_out


@launched_by(_norm_rope2d)
def _launch_norm_rope2d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    num_heads: int,
    eps: float,
    rotate_k: bool,
) -> tuple[Tensor, Tensor]:
    from .forward import launch_forward

    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    head_dim = q.shape[1] // num_heads
    launch_forward(q, k, q_weight, k_weight, row, column, table, q_out, k_out, head_dim, eps, rotate_k)
    return q_out.unflatten(-1, (num_heads, -1)), k_out.unflatten(-1, (num_heads, -1))


@_norm_rope2d.register_fake
def _fake_norm_rope2d(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    num_heads: int,
    eps: float,
    rotate_k: bool,
) -> tuple[Tensor, Tensor]:
    heads = (num_heads, q.shape[1] // num_heads)
    return q.new_empty(q.shape[0], *heads), k.new_empty(k.shape[0], *heads)


@custom_op("pixelflow::norm_rope2d_backward", mutates_args=(), device_types="cpu")
def _norm_rope2d_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    eps: float,
    rotate_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q_out = reference.rotate(grad_q_out.to(table.dtype), row, column, table, conjugate=True)
    grad_k_out = grad_k_out.to(table.dtype)
    if rotate_k:
        grad_k_out = reference.rotate(grad_k_out, row, column, table, conjugate=True)
    grad_q, grad_q_weight = reference.rms_norm_backward(grad_q_out.flatten(1), q, q_weight, eps)
    grad_k, grad_k_weight = reference.rms_norm_backward(grad_k_out.flatten(1), k, k_weight, eps)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


@launched_by(_norm_rope2d_backward)
def _launch_norm_rope2d_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    eps: float,
    rotate_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .backward import launch_backward

    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    grad_q_weight, grad_k_weight = launch_backward(
        _dense(grad_q_out.flatten(1)),
        _dense(grad_k_out.flatten(1)),
        q,
        k,
        q_weight,
        k_weight,
        row,
        column,
        table,
        grad_q,
        grad_k,
        grad_q_out.shape[2],
        eps,
        rotate_k,
    )
    return grad_q, grad_k, grad_q_weight.to(q_weight.dtype), grad_k_weight.to(k_weight.dtype)


@_norm_rope2d_backward.register_fake
def _fake_norm_rope2d_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    eps: float,
    rotate_k: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), q_weight.new_empty(q.shape[1]), k_weight.new_empty(k.shape[1])


def _dense(x: Tensor) -> Tensor:
    """Return ``x [T, C]`` if its channels are dense, else a dense copy: gradients may be expanded or transposed."""
    return x if x.stride(1) == 1 else x.contiguous()


def _save_norm_rope2d(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.eps, ctx.rotate_k = inputs
    ctx.save_for_backward(*tensors)


def _norm_rope2d_gradients(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _norm_rope2d_backward(grad_q, grad_k, *ctx.saved_tensors, ctx.eps, ctx.rotate_k)
    return *gradients, None, None, None, None, None, None


_norm_rope2d.register_autograd(_norm_rope2d_gradients, setup_context=_save_norm_rope2d)

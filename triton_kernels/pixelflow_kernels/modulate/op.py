"""Public functions: validation, registration of the implementations, and autograd.

Each call is one custom operation with a CPU implementation (``reference``) and a CUDA one (``forward``, ``backward``,
imported on first use because Triton is not installed everywhere). The variants with a residual share one operation, in
which operands that a variant lacks are None.
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


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout, *, eps: float = 1e-6) -> Tensor:
    """Compute ``LN(x) (1 + scale) + shift`` with the rows of each token's image: before a model's first self-attention.

    LayerNorm has no affine parameters. It is computed in float32 (float64 for float64 tokens) and rounded to the dtype
    of ``x``; the modulation is computed in the rows' dtype and rounded again. Differentiable in x, shift and scale.

    Args:
        x: ``[T, C]`` bf16, fp16, fp32 or fp64, C a multiple of 8; a token's channels are dense, the token stride is
            arbitrary.
        shift, scale: ``[n, C]`` fp32 (fp64 with fp64 tokens); a row's channels are dense and the row stride is
            arbitrary, so slices of one product ``[n, 6C]`` are read in place.
        layout: the image, out of ``n``, of each of the ``T`` tokens.
        eps: added to the variance.

    Returns:
        ``[T, C]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.3.
    """
    _check_tokens(x, layout, eps)
    _check_rows(x, layout, shift=shift, scale=scale)
    return _layer_norm_modulate(x, shift, scale, layout.image_index, layout.cu_seqlens, eps)


def add_gated_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, layout: PackedLayout, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute ``r = x + gate y`` and ``LN(r) (1 + scale) + shift``: from an MLP to the next self-attention or the head.

    ``gate y`` is computed in the gate's dtype and rounded to that of ``y`` before it is added. r has the bits of eager
    PyTorch on the same device. Norm and modulation as in :func:`layer_norm_modulate`. Differentiable in every tensor.

    Args:
        x: ``[T, C]``, as in :func:`layer_norm_modulate`.
        y: ``[T, C]`` in the dtype of ``x``, with dense channels: the output of the residual branch.
        gate, shift, scale: ``[n, C]``, as in :func:`layer_norm_modulate`; slices of the same or of different products.
        layout: the image, out of ``n``, of each of the ``T`` tokens.
        eps: added to the variance.

    Returns:
        r and the modulated norm, both ``[T, C]`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above; the message names it.

    Source: arXiv 2504.07963, section 3.3.
    """
    _check_tokens(x, layout, eps)
    _check_beside(x, y)
    _check_rows(x, layout, gate=gate, shift=shift, scale=scale)
    return _add_norm_modulate(x, y, gate, None, shift, scale, layout.image_index, layout.cu_seqlens, eps)


def add_gated_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: PackedLayout,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Compute ``r = x + gate y`` and ``RMS(r) weight (1 + scale) + shift``: from a self-attention to the MLP.

    ``RMS(r) = r / sqrt(mean(r^2) + eps)``. Arguments, rounding and results are those of
    :func:`add_gated_layer_norm_modulate`, plus ``weight``: ``[C]`` in any of the four dtypes.
    """
    _check_tokens(x, layout, eps)
    _check_beside(x, y)
    _check_weight(x, weight)
    _check_rows(x, layout, gate=gate, shift=shift, scale=scale)
    return _add_norm_modulate(x, y, gate, weight, shift, scale, layout.image_index, layout.cu_seqlens, eps)


def add_gated_rms_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, layout: PackedLayout, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute ``r = x + gate y`` and ``RMS(r) weight``: from a self-attention to the cross-attention that follows it.

    Like :func:`add_gated_rms_norm_modulate`, without the modulation.
    """
    _check_tokens(x, layout, eps)
    _check_beside(x, y)
    _check_weight(x, weight)
    _check_rows(x, layout, gate=gate)
    return _add_norm_modulate(x, y, gate, weight, None, None, layout.image_index, layout.cu_seqlens, eps)


def add_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    layout: PackedLayout,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Compute ``r = x + y`` and ``RMS(r) weight (1 + scale) + shift``: from a cross-attention to the MLP.

    Like :func:`add_gated_rms_norm_modulate`, without the gate.
    """
    _check_tokens(x, layout, eps)
    _check_beside(x, y)
    _check_weight(x, weight)
    _check_rows(x, layout, shift=shift, scale=scale)
    return _add_norm_modulate(x, y, None, weight, shift, scale, layout.image_index, layout.cu_seqlens, eps)


# --- validation --------------------------------------------------------------------------------------------


def _check_tokens(x: Tensor, layout: PackedLayout, eps: float) -> None:
    if x.ndim != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected two dimensions [T, C]")
    check_dense("x", x)
    if x.shape[1] == 0 or x.shape[1] % 8 != 0:
        raise ValueError(f"x: got width {x.shape[1]}, expected a positive multiple of 8")
    check_num_tokens("x", x, layout)
    check_device("layout", layout.image_index, "x", x)
    check_eps(eps)


def _check_beside(x: Tensor, y: Tensor) -> None:
    if y.shape != x.shape:
        raise ValueError(f"y: got shape {tuple(y.shape)}, expected that of x {tuple(x.shape)}")
    if y.dtype != x.dtype:
        raise ValueError(f"y: got {y.dtype}, expected the type of x ({x.dtype})")
    check_dense("y", y)
    check_device("y", y, "x", x)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    check_weight("weight", weight, x.shape[1])
    check_device("weight", weight, "x", x)


def _check_rows(x: Tensor, layout: PackedLayout, **rows: Tensor) -> None:
    high_type = torch.promote_types(x.dtype, torch.float32)
    for name, row in rows.items():
        if tuple(row.shape) != (layout.num_images, x.shape[1]):
            expected = f"[{layout.num_images}, {x.shape[1]}], a row for each image"
            raise ValueError(f"{name}: got shape {tuple(row.shape)}, expected {expected}")
        if row.dtype != high_type:
            raise ValueError(f"{name}: got {row.dtype}, expected {high_type} beside {x.dtype} tokens")
        check_dense(name, row)
        check_device(name, row, "x", x)


# --- norm and modulation -----------------------------------------------------------------------------------


@custom_op("pixelflow::layer_norm_modulate", mutates_args=(), device_types="cpu")
def _layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, image_index: Tensor, cu_seqlens: Tensor, eps: float
) -> Tensor:
    return reference.modulate(reference.norm(x, None, eps), shift, scale, image_index)


@launched_by(_layer_norm_modulate)
def _launch_layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, image_index: Tensor, cu_seqlens: Tensor, eps: float
) -> Tensor:
    from .forward import launch_forward

    out = x.new_empty(x.shape)
    launch_forward(x, None, None, None, shift, scale, image_index, None, out, eps)
    return out


@_layer_norm_modulate.register_fake
def _fake_layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, image_index: Tensor, cu_seqlens: Tensor, eps: float
) -> Tensor:
    return x.new_empty(x.shape)


def _save_layer_norm_modulate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, image_index, cu_seqlens, ctx.eps = inputs
    ctx.save_for_backward(x, scale, image_index, cu_seqlens)


def _layer_norm_modulate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, image_index, cu_seqlens = ctx.saved_tensors
    rows, grad_x = _backward(grad, None, x, None, None, None, scale, image_index, cu_seqlens, ctx.eps)
    return grad_x, rows[1], rows[0], None, None, None


_layer_norm_modulate.register_autograd(_layer_norm_modulate_gradients, setup_context=_save_layer_norm_modulate)


# --- residual, norm and modulation -------------------------------------------------------------------------


@custom_op("pixelflow::add_norm_modulate", mutates_args=(), device_types="cpu")
def _add_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    cu_seqlens: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    residual = reference.add_gated(x, y, gate, image_index)
    normed = reference.norm(residual, weight, eps)
    if shift is None or scale is None:
        return residual, normed
    return residual, reference.modulate(normed, shift, scale, image_index)


@launched_by(_add_norm_modulate)
def _launch_add_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    cu_seqlens: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from .forward import launch_forward

    residual, out = x.new_empty(x.shape), x.new_empty(x.shape)
    launch_forward(x, y, gate, weight, shift, scale, image_index, residual, out, eps)
    return residual, out


@_add_norm_modulate.register_fake
def _fake_add_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    cu_seqlens: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _save_add_norm_modulate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, weight, _, scale, image_index, cu_seqlens, ctx.eps = inputs
    ctx.save_for_backward(output[0], None if gate is None else y, gate, weight, scale, image_index, cu_seqlens)
    ctx.set_materialize_grads(False)  # a model's last residual is unused, so no zero gradient is read for it


def _add_norm_modulate_gradients(
    ctx: Any, grad_residual: Tensor | None, grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    residual, y, gate, weight, scale, image_index, cu_seqlens = ctx.saved_tensors
    grad = torch.zeros_like(residual) if grad is None else grad
    rows, grad_x, *grad_y = _backward(
        grad, grad_residual, residual, y, gate, weight, scale, image_index, cu_seqlens, ctx.eps
    )
    grad_gate = None if gate is None else rows[-1]
    grad_shift = None if scale is None else rows[1]
    grad_scale = None if scale is None else rows[0] if weight is None else rows[0] * weight
    grad_weight = None
    if weight is not None:
        grad_weight = (rows[0] if scale is None else rows[0] * (1 + scale)).sum(0).to(weight.dtype)
    grad_y = grad_y[0] if grad_y else grad_x
    return grad_x, grad_y, grad_gate, grad_weight, grad_shift, grad_scale, None, None, None


_add_norm_modulate.register_autograd(_add_norm_modulate_gradients, setup_context=_save_add_norm_modulate)


# --- backward ----------------------------------------------------------------------------------------------


@custom_op("pixelflow::norm_modulate_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    cu_seqlens: Tensor,
    eps: float,
) -> list[Tensor]:
    """Compute per-image sums ``[K, n, C]`` (of g u; with a scale, g; with a gate, dr y), dx and, with a gate, dy."""
    images = cu_seqlens.shape[0] - 1
    # Elementwise results would take the strides of a transposed gradient.
    grad = grad.contiguous()
    grad_residual = None if grad_residual is None else grad_residual.contiguous()
    return reference.backward(grad, grad_residual, residual, y, gate, weight, scale, image_index, images, eps)


@launched_by(_backward)
def _launch_backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    cu_seqlens: Tensor,
    eps: float,
) -> list[Tensor]:
    from .backward import launch_backward

    rows, *grads = _empty_gradients(residual, gate, scale, cu_seqlens)
    launch_backward(
        _dense(grad),
        None if grad_residual is None else _dense(grad_residual),
        residual,
        y,
        gate,
        weight,
        scale,
        cu_seqlens,
        grads[0],
        grads[1] if len(grads) > 1 else None,
        rows,
        eps,
    )
    return [rows, *grads]


@_backward.register_fake
def _fake_backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    cu_seqlens: Tensor,
    eps: float,
) -> list[Tensor]:
    return _empty_gradients(residual, gate, scale, cu_seqlens)


def _empty_gradients(residual: Tensor, gate: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor) -> list[Tensor]:
    kinds = 1 + (scale is not None) + (gate is not None)
    high_type = torch.promote_types(residual.dtype, torch.float32)
    rows = residual.new_empty(kinds, cu_seqlens.shape[0] - 1, residual.shape[1], dtype=high_type)
    return [rows, *(residual.new_empty(residual.shape) for _ in range(1 if gate is None else 2))]


def _dense(x: Tensor) -> Tensor:
    """Return ``x [T, C]`` if its channels are dense, else a dense copy: gradients may be expanded or transposed."""
    return x if x.stride(1) == 1 else x.contiguous()

"""Kernels for the gradients of the gated residual, norm and modulation of ``forward.py``.

With u the unit token (normalised, before the weight), g the output's gradient and k = weight (1 + scale):

    du = g k      dr = (du - mean(du) - u mean(du u)) / std + (r's own gradient)      (RMSNorm: without mean(du))
    dx = dr      dy = gate dr      dgate = sum dr y      dshift = sum g      dscale = weight sum g u

The sums run over an image's tokens and are computed in two passes. In the first, each program handles up to TOKENS
consecutive tokens of one image, keeps the image's rows in registers and writes one row of partial sums per gradient.
The second adds the partial rows of each image. There are no atomics, and the division into runs starts at the image's
first token, so a row's gradient has the same bits in every run and next to any other images. The weight's gradient
follows from the per-image sums: ``dweight = sum over images of (1 + scale) sum g u``.

The statistics are recomputed from r. This takes one more reduction over a token that is in registers anyway, whereas
saving them would add two outputs to the forward pass.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

from .forward import load_high, parts_of, shape_class, stride


@triton.jit
def _fold(main, tail):
    """Add the main part onto the tail, so that a sum over both needs one cross-lane reduction.

    The compiler chooses which channels are added to which.
    """
    if main.numel != tail.numel:
        main = tl.sum(tl.reshape(main, [main.numel // tail.numel, tail.numel], can_reorder=True), 0)
    return main + tail


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _image_of_slot(cu_seqlens_ptr, slot, num_images, TOKENS: tl.constexpr):
    """Return the last image whose first slot, ``cu_seqlens[i] // TOKENS + i``, is at or before ``slot``.

    An image of N tokens has at least ceil(N / TOKENS) slots before the next image's first one; the remaining slots
    stay empty.
    """
    image = 0
    for start in range(0, num_images, 128):
        index = start + tl.arange(0, 128)
        begin = tl.load(cu_seqlens_ptr + index, mask=index < num_images, other=0)
        image += tl.sum(((begin // TOKENS + index <= slot) & (index < num_images)).to(tl.int32))
    return image - 1


@triton.jit
def _factors(weight_ptr, scale_ptr, channels, WIDTH: tl.constexpr, high: tl.constexpr):
    """One part of ``weight (1 + scale)``."""
    factors = tl.full(channels.shape, 1.0, dtype=high)
    if scale_ptr is not None:
        factors += load_high(scale_ptr, channels, WIDTH, high)
    if weight_ptr is not None:
        factors *= load_high(weight_ptr, channels, WIDTH, high)
    return factors


@triton.jit
def _finish(grad_x, grad_residual_ptr, grad_x_ptr, channels, WIDTH: tl.constexpr):
    """One part of dr: add the residual's own gradient, store the result, and return it in the high dtype."""
    if grad_residual_ptr is not None:
        grad_x += load_high(grad_residual_ptr, channels, WIDTH, grad_x.dtype)
    tl.store(grad_x_ptr + channels, grad_x.to(grad_x_ptr.dtype.element_ty), mask=channels < WIDTH)
    return grad_x


@triton.jit
def _through_gate(grad_x, gate, y_ptr, grad_y_ptr, channels, WIDTH: tl.constexpr):
    """Store one part of dy and return the same part of the token's contribution to the gate's gradient."""
    tl.store(grad_y_ptr + channels, (gate * grad_x).to(grad_y_ptr.dtype.element_ty), mask=channels < WIDTH)
    return grad_x * load_high(y_ptr, channels, WIDTH, grad_x.dtype)


@triton.jit
def _modulate_backward_kernel(
    grad_ptr,
    grad_residual_ptr,
    residual_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    scale_ptr,
    cu_seqlens_ptr,
    grad_x_ptr,
    grad_y_ptr,
    partial_unit_ptr,
    partial_shift_ptr,
    partial_gate_ptr,
    stride_grad_token,
    stride_grad_residual_token,
    stride_residual_token,
    stride_y_token,
    stride_gate_image,
    stride_scale_image,
    stride_grad_x_token,
    stride_grad_y_token,
    num_images,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per slot: up to TOKENS tokens of one image. RMSNorm if there is a weight, else LayerNorm."""
    high: tl.constexpr = partial_unit_ptr.dtype.element_ty
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    slot = tl.program_id(0)
    image = _image_of_slot(cu_seqlens_ptr, slot, num_images, TOKENS)
    begin = tl.load(cu_seqlens_ptr + image)
    first = begin.to(tl.int64) + (slot - (begin // TOKENS + image)).to(tl.int64) * TOKENS
    last = tl.minimum(first + TOKENS, tl.load(cu_seqlens_ptr + image + 1).to(tl.int64))
    if scale_ptr is not None:
        scale_ptr += image.to(tl.int64) * stride_scale_image
    factors_main = _factors(weight_ptr, scale_ptr, main, WIDTH, high)
    factors_tail = _factors(weight_ptr, scale_ptr, tail, WIDTH, high)
    unit_main, unit_tail = tl.zeros([MAIN], dtype=high), tl.zeros([TAIL], dtype=high)
    if partial_shift_ptr is not None:
        shift_main, shift_tail = tl.zeros([MAIN], dtype=high), tl.zeros([TAIL], dtype=high)
    if gate_ptr is not None:
        gate_ptr += image.to(tl.int64) * stride_gate_image
        gate_main = load_high(gate_ptr, main, WIDTH, high)
        gate_tail = load_high(gate_ptr, tail, WIDTH, high)
        grad_gate_main, grad_gate_tail = tl.zeros([MAIN], dtype=high), tl.zeros([TAIL], dtype=high)
    for token in range(first, last):
        grad_main = load_high(grad_ptr + token * stride_grad_token, main, WIDTH, high)
        grad_tail = load_high(grad_ptr + token * stride_grad_token, tail, WIDTH, high)
        x_main = load_high(residual_ptr + token * stride_residual_token, main, WIDTH, high)
        x_tail = load_high(residual_ptr + token * stride_residual_token, tail, WIDTH, high)
        du_main, du_tail = grad_main * factors_main, grad_tail * factors_tail
        if weight_ptr is None:
            mean = tl.sum(_fold(x_main, x_tail)) * (1 / WIDTH)
            x_main = tl.where(main < WIDTH, x_main - mean, 0.0)
            x_tail = tl.where(tail < WIDTH, x_tail - mean, 0.0)
            # As in the forward pass, the remaining mean of the differences is removed: from the variance, from the
            # product with du, and from the token.
            rest, square, mean_du, product = tl.reduce(
                (
                    _fold(x_main, x_tail) * (1 / WIDTH),
                    _fold(x_main * x_main, x_tail * x_tail) * (1 / WIDTH),
                    _fold(du_main, du_tail) * (1 / WIDTH),
                    _fold(du_main * x_main, du_tail * x_tail) * (1 / WIDTH),
                ),
                0,
                _add_four,
            )
            reciprocal = tl.rsqrt(square - rest * rest + EPS)
            along = (product - rest * mean_du) * reciprocal
            x_main, x_tail = (x_main - rest) * reciprocal, (x_tail - rest) * reciprocal
            du_main, du_tail = du_main - mean_du, du_tail - mean_du
        else:
            square, product = tl.reduce(
                (
                    _fold(x_main * x_main, x_tail * x_tail) * (1 / WIDTH),
                    _fold(du_main * x_main, du_tail * x_tail) * (1 / WIDTH),
                ),
                0,
                _add_two,
            )
            reciprocal = tl.rsqrt(square + EPS)
            along = product * reciprocal
            x_main, x_tail = x_main * reciprocal, x_tail * reciprocal
        unit_main += grad_main * x_main
        unit_tail += grad_tail * x_tail
        if partial_shift_ptr is not None:
            shift_main += grad_main
            shift_tail += grad_tail
        own_ptr = grad_residual_ptr
        if grad_residual_ptr is not None:
            own_ptr = grad_residual_ptr + token * stride_grad_residual_token
        out_ptr = grad_x_ptr + token * stride_grad_x_token
        dr_main = _finish(reciprocal * (du_main - x_main * along), own_ptr, out_ptr, main, WIDTH)
        dr_tail = _finish(reciprocal * (du_tail - x_tail * along), own_ptr, out_ptr, tail, WIDTH)
        if gate_ptr is not None:
            in_ptr = y_ptr + token * stride_y_token
            out_ptr = grad_y_ptr + token * stride_grad_y_token
            grad_gate_main += _through_gate(dr_main, gate_main, in_ptr, out_ptr, main, WIDTH)
            grad_gate_tail += _through_gate(dr_tail, gate_tail, in_ptr, out_ptr, tail, WIDTH)
    row = slot.to(tl.int64) * WIDTH
    tl.store(partial_unit_ptr + row + main, unit_main, mask=main < WIDTH)
    tl.store(partial_unit_ptr + row + tail, unit_tail, mask=tail < WIDTH)
    if partial_shift_ptr is not None:
        tl.store(partial_shift_ptr + row + main, shift_main, mask=main < WIDTH)
        tl.store(partial_shift_ptr + row + tail, shift_tail, mask=tail < WIDTH)
    if gate_ptr is not None:
        tl.store(partial_gate_ptr + row + main, grad_gate_main, mask=main < WIDTH)
        tl.store(partial_gate_ptr + row + tail, grad_gate_tail, mask=tail < WIDTH)


@triton.jit
def _sum_kernel(
    partial_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_slots,
    num_images,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Sum each image's partial rows; one program per image, block of channels and gradient."""
    image, block, gradient = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    begin, end = tl.load(cu_seqlens_ptr + image), tl.load(cu_seqlens_ptr + image + 1)
    slots = tl.cdiv(end - begin, TOKENS)
    partial_ptr += (gradient.to(tl.int64) * num_slots + begin // TOKENS + image) * WIDTH
    total = tl.zeros([BLOCK_SLOTS, BLOCK_CHANNELS], dtype=partial_ptr.dtype.element_ty)
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        mask = (slot < slots)[:, None] & (channels < WIDTH)[None, :]
        total += tl.load(partial_ptr + slot.to(tl.int64)[:, None] * WIDTH + channels[None, :], mask=mask, other=0.0)
    out_ptr += (gradient.to(tl.int64) * num_images + image) * WIDTH
    tl.store(out_ptr + channels, tl.sum(total, axis=0), mask=channels < WIDTH)


def launch_backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    cu_seqlens: Tensor,
    grad_x: Tensor,
    grad_y: Tensor | None,
    rows: Tensor,
    eps: float,
    config: Mapping[str, int] | None = None,
    sum_config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``grad_x``, ``rows`` and, with a gate, ``grad_y``.

    Tokens are ``[T, C]``. ``rows`` is ``[K, n, C]``, contiguous: per-image sums of g u; with a scale, of g; with a
    gate, of dr y.
    """
    (tokens, width), (gradients, images, _) = residual.shape, rows.shape
    if images == 0:
        return
    arch = arch_of(residual.device)
    if config is None:
        config = launch_config("modulate.backward", shape_class(width, residual.dtype), arch)
    sum_config = launch_config("modulate.sum", "any", arch) if sum_config is None else sum_config
    slots = tokens // config["TOKENS"] + images
    partial = rows.new_empty(gradients, slots, width)
    with torch.cuda.device_of(residual):
        _modulate_backward_kernel[(slots,)](
            grad_ptr=grad,
            grad_residual_ptr=grad_residual,
            residual_ptr=residual,
            y_ptr=y,
            gate_ptr=gate,
            weight_ptr=weight,
            scale_ptr=scale,
            cu_seqlens_ptr=cu_seqlens,
            grad_x_ptr=grad_x,
            grad_y_ptr=grad_y,
            partial_unit_ptr=partial[0],
            partial_shift_ptr=None if scale is None else partial[1],
            partial_gate_ptr=None if gate is None else partial[-1],
            stride_grad_token=grad.stride(0),
            stride_grad_residual_token=stride(grad_residual),
            stride_residual_token=residual.stride(0),
            stride_y_token=stride(y),
            stride_gate_image=stride(gate),
            stride_scale_image=stride(scale),
            stride_grad_x_token=grad_x.stride(0),
            stride_grad_y_token=stride(grad_y),
            num_images=images,
            EPS=eps,
            WIDTH=width,
            enable_fp_fusion=True,
            **parts_of(width),
            **config,
        )
        _sum_kernel[(images, triton.cdiv(width, sum_config["BLOCK_CHANNELS"]), gradients)](
            partial_ptr=partial,
            cu_seqlens_ptr=cu_seqlens,
            out_ptr=rows,
            num_slots=slots,
            num_images=images,
            WIDTH=width,
            TOKENS=config["TOKENS"],
            enable_fp_fusion=True,
            **sum_config,
        )

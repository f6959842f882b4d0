"""Kernel for gated residual, norm and modulation in one pass over the tokens.

    r = x + gate y      u = LN(r) or weight RMS(r)      z = u (1 + scale) + shift

Source: arXiv 2504.07963, section 3.3. Shapes: ``T`` tokens of ``n`` images, ``C`` channels; ``gate``, ``shift`` and
``scale`` have one row per image. Operands that a variant lacks are None; Triton compiles a kernel per set of operands.

A program holds one whole token in registers, split into MAIN + TAIL channels (1024 + 128 for 1152) because tile sizes
are powers of two. The product with the gate, r, u and z are each rounded to the tensor's dtype, as separate operations
would do. Multiply-adds are not fused, so r has the bits of eager PyTorch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

LIMITS = (320, 640, 1280, 2560, 5120)  # channels; the launch configurations' shape classes


@triton.jit
def load_high(pointer, channels, WIDTH: tl.constexpr, high: tl.constexpr):
    """Load one part of a token (or of a weight or a row), converted to the compute dtype."""
    return tl.load(pointer + channels, mask=channels < WIDTH, other=0.0).to(high)


@triton.jit
def _residual(x_ptr, y_ptr, gate_ptr, channels, WIDTH: tl.constexpr, high: tl.constexpr):
    """One part of ``x + gate y``; the product and the sum are each rounded to the tensor's dtype."""
    low: tl.constexpr = x_ptr.dtype.element_ty
    x = load_high(x_ptr, channels, WIDTH, high)
    if y_ptr is not None:
        y = load_high(y_ptr, channels, WIDTH, high)
        if gate_ptr is not None:
            y = (load_high(gate_ptr, channels, WIDTH, high) * y).to(low).to(high)
        x = (x + y).to(low).to(high)
    return x


@triton.jit
def _modulated(unit, weight_ptr, shift_ptr, scale_ptr, channels, WIDTH: tl.constexpr, low: tl.constexpr):
    """One part of the output from the same part of the unit token; the norm is rounded to the tensor's dtype first."""
    high: tl.constexpr = unit.dtype
    if weight_ptr is not None:
        unit *= load_high(weight_ptr, channels, WIDTH, high)
    normed = unit.to(low)
    if shift_ptr is not None:
        scale = load_high(scale_ptr, channels, WIDTH, high)
        normed = (normed.to(high) * (1 + scale) + load_high(shift_ptr, channels, WIDTH, high)).to(low)
    return normed


@triton.jit
def _modulate_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    shift_ptr,
    scale_ptr,
    image_index_ptr,
    residual_ptr,
    out_ptr,
    stride_x_token,
    stride_y_token,
    stride_gate_image,
    stride_shift_image,
    stride_scale_image,
    stride_residual_token,
    stride_out_token,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per token. RMSNorm if there is a weight, else LayerNorm."""
    low: tl.constexpr = x_ptr.dtype.element_ty
    high: tl.constexpr = tl.float64 if low == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64)
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    image = tl.load(image_index_ptr + token).to(tl.int64)
    x_ptr += token * stride_x_token
    if y_ptr is not None:
        y_ptr += token * stride_y_token
    if gate_ptr is not None:
        gate_ptr += image * stride_gate_image
    if shift_ptr is not None:
        shift_ptr += image * stride_shift_image
        scale_ptr += image * stride_scale_image
    x_main = _residual(x_ptr, y_ptr, gate_ptr, main, WIDTH, high)
    x_tail = _residual(x_ptr, y_ptr, gate_ptr, tail, WIDTH, high)
    if y_ptr is not None:
        residual_ptr += token * stride_residual_token
        tl.store(residual_ptr + main, x_main.to(low), mask=main < WIDTH)
        tl.store(residual_ptr + tail, x_tail.to(low), mask=tail < WIDTH)
    if weight_ptr is None:
        mean = (tl.sum(x_main) + tl.sum(x_tail)) * (1 / WIDTH)
        x_main = tl.where(main < WIDTH, x_main - mean, 0.0)
        x_tail = tl.where(tail < WIDTH, x_tail - mean, 0.0)
        # The mean of the differences is the rounding error of the mean. Without this correction it would shift the
        # whole token if the mean is much larger than the spread.
        rest = (tl.sum(x_main) + tl.sum(x_tail)) * (1 / WIDTH)
        square = (tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) * (1 / WIDTH)
        reciprocal = tl.rsqrt(square - rest * rest + EPS)
        x_main, x_tail = (x_main - rest) * reciprocal, (x_tail - rest) * reciprocal
    else:
        square = (tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) * (1 / WIDTH)
        reciprocal = tl.rsqrt(square + EPS)
        x_main, x_tail = x_main * reciprocal, x_tail * reciprocal
    out_ptr += token * stride_out_token
    out = _modulated(x_main, weight_ptr, shift_ptr, scale_ptr, main, WIDTH, low)
    tl.store(out_ptr + main, out, mask=main < WIDTH)
    out = _modulated(x_tail, weight_ptr, shift_ptr, scale_ptr, tail, WIDTH, low)
    tl.store(out_ptr + tail, out, mask=tail < WIDTH)


def parts_of(width: int) -> dict[str, int]:
    """Split ``width`` channels: MAIN is the largest power of two below ``width``, TAIL covers the rest."""
    main = 1 << (width - 1).bit_length() - 1
    return {"MAIN": main, "TAIL": triton.next_power_of_2(width - main)}


def shape_class(width: int, dtype: torch.dtype) -> str:
    """Name of the launch configuration's shape class, e.g. ``"half-c1280"``: the tokens' dtype and largest width."""
    kind = {2: "half", 4: "fp32", 8: "fp64"}[dtype.itemsize]
    return f"{kind}-c{next((limit for limit in LIMITS if width <= limit), 'more')}"


def launch_forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    image_index: Tensor,
    residual: Tensor | None,
    out: Tensor,
    eps: float,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out`` and, if ``y`` is given, ``residual``.

    Tokens are ``[T, C]`` and rows ``[n, C]``, with dense channels and any stride between tokens or rows. ``shift`` and
    ``scale`` are given together or not at all.
    """
    tokens, width = x.shape
    if tokens == 0:
        return
    if config is None:
        config = launch_config("modulate.forward", shape_class(width, x.dtype), arch_of(x.device))
    with torch.cuda.device_of(x):
        _modulate_forward_kernel[(tokens,)](
            x_ptr=x,
            y_ptr=y,
            gate_ptr=gate,
            weight_ptr=weight,
            shift_ptr=shift,
            scale_ptr=scale,
            image_index_ptr=image_index,
            residual_ptr=residual,
            out_ptr=out,
            stride_x_token=x.stride(0),
            stride_y_token=stride(y),
            stride_gate_image=stride(gate),
            stride_shift_image=stride(shift),
            stride_scale_image=stride(scale),
            stride_residual_token=stride(residual),
            stride_out_token=out.stride(0),
            EPS=eps,
            WIDTH=width,
            enable_fp_fusion=False,  # the residual is level A
            **parts_of(width),
            **config,
        )


def stride(x: Tensor | None) -> int:
    """Stride from one row to the next; 0 for an absent operand."""
    return 0 if x is None else x.stride(0)

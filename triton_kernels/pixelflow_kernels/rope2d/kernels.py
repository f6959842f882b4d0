"""Full-width RMSNorm and 2-D RoPE of query and key in one pass, forward and backward, and the rotation alone.

    n = x / sqrt(mean(x^2) + eps)    y = w n    z = (y_0 cos - y_1 sin, y_1 cos + y_0 sin) for every pair of y

Source: arXiv 2504.07963, section 3.3. Shapes: ``T`` tokens, ``C = H * D`` channels.

A warp holds one whole token in registers. As a tile's edge is a power of two and C (1152) seldom is, a token is cut in
two parts, MAIN + TAIL channels (1024 + 128), where one padded part (2048) would leave 44% of the lanes idle. Tiles are
one-dimensional: with several tokens to a tile the two parts get different layouts, and the scale that they share drags
the larger one through hundreds of shuffles.

The table holds cosine and sine of a pair side by side, so a tile of it has exactly the shape of a tile of channels:
both are loaded 16 bytes at a time into one register layout, and pairs are taken apart in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

LIMITS = (1280, 2560, 5120)  # channels; the launch configurations' shape classes
MAX_PARTIALS = 1024  # rows of partial weight gradients that one backward may leave to be added up


@triton.jit
def _load_high(pointer, channels, WIDTH: tl.constexpr, high: tl.constexpr):
    """One part of a token (or of a weight), in the type that is computed in."""
    return tl.load(pointer + channels, mask=channels < WIDTH, other=0.0).to(high)


@triton.jit
def _load_table(table_ptr, row, column, channels, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Cosines and sines of one part of a token at ``row`` and ``column``; of a head, first by column, then by row."""
    HALF: tl.constexpr = HEAD_DIM // 2
    inside = channels % HEAD_DIM
    place = tl.where(inside < HALF, column, row) * HALF + inside % HALF
    # HALF is a multiple of 4, so four neighbours that start at a multiple of 4 share their half of a head. The hint
    # must be in the function that computes the sum: on the result of a call it is lost.
    place = tl.max_contiguous(tl.multiple_of(place, 4), 4)
    return tl.load(table_ptr + place, mask=channels < WIDTH, other=0.0)


@triton.jit
def _turn(x, table, CONJUGATE: tl.constexpr):
    """Rotate neighbouring pairs; written so that without fused multiply-add every step rounds as PyTorch's does."""
    a, b = tl.split(tl.reshape(x, [x.numel // 2, 2]))
    cos, sin = tl.split(tl.reshape(table, [x.numel // 2, 2]))
    # Not by `-sin`, which Triton computes as 0 - sin: that is +0 where sin is +0, and a zero's sign would be lost.
    if CONJUGATE:
        first, second = a * cos + b * sin, b * cos - a * sin
    else:
        first, second = a * cos - b * sin, b * cos + a * sin
    return tl.reshape(tl.join(first, second), x.shape)


@triton.jit
def _rotate_kernel(
    x_ptr,
    row_ptr,
    column_ptr,
    table_ptr,
    out_ptr,
    stride_x_token,
    stride_out_token,
    CONJUGATE: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per token."""
    high: tl.constexpr = table_ptr.dtype.element_ty
    low: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0)
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    x_ptr += token.to(tl.int64) * stride_x_token
    out_ptr += token.to(tl.int64) * stride_out_token
    x_main = _load_high(x_ptr, main, WIDTH, high)
    x_tail = _load_high(x_ptr, tail, WIDTH, high)
    row, column = tl.load(row_ptr + token), tl.load(column_ptr + token)
    table_main = _load_table(table_ptr, row, column, main, WIDTH, HEAD_DIM)
    table_tail = _load_table(table_ptr, row, column, tail, WIDTH, HEAD_DIM)
    tl.store(out_ptr + main, _turn(x_main, table_main, CONJUGATE).to(low), mask=main < WIDTH)
    tl.store(out_ptr + tail, _turn(x_tail, table_tail, CONJUGATE).to(low), mask=tail < WIDTH)


@triton.jit
def _norm_token(
    x_ptr,
    weight_ptr,
    row_ptr,
    column_ptr,
    table_ptr,
    out_ptr,
    stride_x_token,
    stride_out_token,
    token,
    ROTATE: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Norm, and where ROTATE turn, one token of one tensor."""
    high: tl.constexpr = table_ptr.dtype.element_ty
    low: tl.constexpr = out_ptr.dtype.element_ty
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    x_ptr += token.to(tl.int64) * stride_x_token
    out_ptr += token.to(tl.int64) * stride_out_token
    x_main = _load_high(x_ptr, main, WIDTH, high)
    x_tail = _load_high(x_ptr, tail, WIDTH, high)
    scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) / WIDTH + EPS)
    # Rounded to the tensor's type as the separate norm does, whether it is turned afterwards or not.
    y_main = (_load_high(weight_ptr, main, WIDTH, high) * (x_main * scale)).to(low)
    y_tail = (_load_high(weight_ptr, tail, WIDTH, high) * (x_tail * scale)).to(low)
    if ROTATE:
        row, column = tl.load(row_ptr + token), tl.load(column_ptr + token)
        table_main = _load_table(table_ptr, row, column, main, WIDTH, HEAD_DIM)
        table_tail = _load_table(table_ptr, row, column, tail, WIDTH, HEAD_DIM)
        y_main = _turn(y_main.to(high), table_main, CONJUGATE=False).to(low)
        y_tail = _turn(y_tail.to(high), table_tail, CONJUGATE=False).to(low)
    tl.store(out_ptr + main, y_main, mask=main < WIDTH)
    tl.store(out_ptr + tail, y_tail, mask=tail < WIDTH)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    row_ptr,
    column_ptr,
    table_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_q_token,
    stride_k_token,
    stride_q_out_token,
    stride_k_out_token,
    num_q_tokens,
    ROTATE_K: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One program per token: first those of q, then those of k."""
    token = tl.program_id(0)
    if token < num_q_tokens:
        _norm_token(
            q_ptr, q_weight_ptr, row_ptr, column_ptr, table_ptr, q_out_ptr, stride_q_token, stride_q_out_token,
            token, True, EPS, WIDTH, HEAD_DIM, MAIN, TAIL,
        )  # fmt: skip
    else:
        _norm_token(
            k_ptr, k_weight_ptr, row_ptr, column_ptr, table_ptr, k_out_ptr, stride_k_token, stride_k_out_token,
            token - num_q_tokens, ROTATE_K, EPS, WIDTH, HEAD_DIM, MAIN, TAIL,
        )  # fmt: skip


@triton.jit
def _norm_tokens_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    row_ptr,
    column_ptr,
    table_ptr,
    grad_x_ptr,
    partial_ptr,
    stride_grad_token,
    stride_x_token,
    stride_grad_x_token,
    num_tokens,
    part,
    tokens_per_program,
    ROTATE: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Gradient of the ``part``-th run of tokens of one tensor, and that run's share of the weight's gradient.

    dy is dz turned back, dn = w dy, dx = (dn - n mean(dn n)) / sqrt(mean(x^2) + eps), dw = sum over tokens of n dy.
    """
    high: tl.constexpr = table_ptr.dtype.element_ty
    low: tl.constexpr = grad_x_ptr.dtype.element_ty
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    weight_main = _load_high(weight_ptr, main, WIDTH, high)
    weight_tail = _load_high(weight_ptr, tail, WIDTH, high)
    sum_main = tl.zeros([MAIN], dtype=high)
    sum_tail = tl.zeros([TAIL], dtype=high)
    first = part.to(tl.int64) * tokens_per_program
    for token in range(first, tl.minimum(first + tokens_per_program, num_tokens)):
        x_main = _load_high(x_ptr + token * stride_x_token, main, WIDTH, high)
        x_tail = _load_high(x_ptr + token * stride_x_token, tail, WIDTH, high)
        grad_main = _load_high(grad_ptr + token * stride_grad_token, main, WIDTH, high)
        grad_tail = _load_high(grad_ptr + token * stride_grad_token, tail, WIDTH, high)
        if ROTATE:
            row, column = tl.load(row_ptr + token), tl.load(column_ptr + token)
            table_main = _load_table(table_ptr, row, column, main, WIDTH, HEAD_DIM)
            table_tail = _load_table(table_ptr, row, column, tail, WIDTH, HEAD_DIM)
            grad_main = _turn(grad_main, table_main, CONJUGATE=True)
            grad_tail = _turn(grad_tail, table_tail, CONJUGATE=True)
        scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) / WIDTH + EPS)
        x_main, x_tail = x_main * scale, x_tail * scale
        sum_main += grad_main * x_main
        sum_tail += grad_tail * x_tail
        grad_main, grad_tail = grad_main * weight_main, grad_tail * weight_tail
        along = (tl.sum(grad_main * x_main) + tl.sum(grad_tail * x_tail)) / WIDTH
        out_ptr = grad_x_ptr + token * stride_grad_x_token
        tl.store(out_ptr + main, (scale * (grad_main - x_main * along)).to(low), mask=main < WIDTH)
        tl.store(out_ptr + tail, (scale * (grad_tail - x_tail * along)).to(low), mask=tail < WIDTH)
    partial_ptr += part.to(tl.int64) * WIDTH
    tl.store(partial_ptr + main, sum_main, mask=main < WIDTH)
    tl.store(partial_ptr + tail, sum_tail, mask=tail < WIDTH)


@triton.jit
def _backward_kernel(
    grad_q_out_ptr,
    grad_k_out_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    row_ptr,
    column_ptr,
    table_ptr,
    grad_q_ptr,
    grad_k_ptr,
    partial_q_ptr,
    partial_k_ptr,
    stride_grad_q_out_token,
    stride_grad_k_out_token,
    stride_q_token,
    stride_k_token,
    stride_grad_q_token,
    stride_grad_k_token,
    num_q_tokens,
    num_k_tokens,
    num_q_parts,
    tokens_per_program,
    ROTATE_K: tl.constexpr,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The first ``num_q_parts`` programs work on q, the others on k."""
    part = tl.program_id(0)
    if part < num_q_parts:
        _norm_tokens_backward(
            grad_q_out_ptr, q_ptr, q_weight_ptr, row_ptr, column_ptr, table_ptr, grad_q_ptr, partial_q_ptr,
            stride_grad_q_out_token, stride_q_token, stride_grad_q_token, num_q_tokens, part, tokens_per_program,
            True, EPS, WIDTH, HEAD_DIM, MAIN, TAIL,
        )  # fmt: skip
    else:
        _norm_tokens_backward(
            grad_k_out_ptr, k_ptr, k_weight_ptr, row_ptr, column_ptr, table_ptr, grad_k_ptr, partial_k_ptr,
            stride_grad_k_out_token, stride_k_token, stride_grad_k_token, num_k_tokens, part - num_q_parts,
            tokens_per_program, ROTATE_K, EPS, WIDTH, HEAD_DIM, MAIN, TAIL,
        )  # fmt: skip


def tile_of(width: int) -> dict[str, int]:
    """How a token is cut: MAIN is the largest power of two below ``width``, TAIL covers the rest."""
    main = max(1 << (width - 1).bit_length() - 1, 1)
    return {"MAIN": main, "TAIL": triton.next_power_of_2(width - main)}


def shape_class(width: int, dtype: torch.dtype) -> str:
    """Name of a launch configuration: the tokens' type, and how many channels at most."""
    kind = {2: "half", 4: "fp32", 8: "fp64"}[dtype.itemsize]
    return f"{kind}-{next((f'c{limit}' for limit in LIMITS if width <= limit), 'wide')}"


def _arguments(kernel: str, x: Tensor, config: Mapping[str, int] | None) -> dict[str, int]:
    if config is None:
        config = launch_config(f"rope2d.{kernel}", shape_class(x.shape[1], x.dtype), arch_of(x.device))
    return {**tile_of(x.shape[1]), **config}


def launch_rotate(
    x: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    out: Tensor,
    head_dim: int,
    conjugate: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """``out = rotate(x)``, both ``[T, C]`` with dense channels."""
    tokens, width = x.shape
    if tokens == 0:
        return
    with torch.cuda.device_of(x):
        _rotate_kernel[(tokens,)](
            x_ptr=x,
            row_ptr=row,
            column_ptr=column,
            table_ptr=table,
            out_ptr=out,
            stride_x_token=x.stride(0),
            stride_out_token=out.stride(0),
            CONJUGATE=conjugate,
            WIDTH=width,
            HEAD_DIM=head_dim,
            enable_fp_fusion=False,  # level A: every product and sum rounds by itself, as in eager PyTorch
            **_arguments("rotate", x, config),
        )


def launch_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    head_dim: int,
    eps: float,
    rotate_k: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``q_out`` and ``k_out``; every ``[T, C]`` tensor has dense channels and a token stride of its own."""
    programs = q.shape[0] + k.shape[0]
    if programs == 0:
        return
    with torch.cuda.device_of(q):
        _forward_kernel[(programs,)](
            q_ptr=q,
            k_ptr=k,
            q_weight_ptr=q_weight,
            k_weight_ptr=k_weight,
            row_ptr=row,
            column_ptr=column,
            table_ptr=table,
            q_out_ptr=q_out,
            k_out_ptr=k_out,
            stride_q_token=q.stride(0),
            stride_k_token=k.stride(0),
            stride_q_out_token=q_out.stride(0),
            stride_k_out_token=k_out.stride(0),
            num_q_tokens=q.shape[0],
            ROTATE_K=rotate_k,
            EPS=eps,
            WIDTH=q.shape[1],
            HEAD_DIM=head_dim,
            enable_fp_fusion=True,
            **_arguments("forward", q, config),
        )


def launch_backward(
    grad_q_out: Tensor,
    grad_k_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    row: Tensor,
    column: Tensor,
    table: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    head_dim: int,
    eps: float,
    rotate_k: bool,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill ``grad_q`` and ``grad_k`` and return the weights' gradients ``[C]`` in the table's type.

    Each program leaves one row of partial sums; the rows are added in a second pass. How the tokens are shared out
    depends on their number alone, so the sums have the same bits in every run.
    """
    per_program = max(triton.cdiv(q.shape[0] + k.shape[0], MAX_PARTIALS), 1)
    q_parts, k_parts = triton.cdiv(q.shape[0], per_program), triton.cdiv(k.shape[0], per_program)
    partial_q, partial_k = (table.new_empty(parts, q.shape[1]) for parts in (q_parts, k_parts))
    if q_parts + k_parts > 0:
        with torch.cuda.device_of(q):
            _backward_kernel[(q_parts + k_parts,)](
                grad_q_out_ptr=grad_q_out,
                grad_k_out_ptr=grad_k_out,
                q_ptr=q,
                k_ptr=k,
                q_weight_ptr=q_weight,
                k_weight_ptr=k_weight,
                row_ptr=row,
                column_ptr=column,
                table_ptr=table,
                grad_q_ptr=grad_q,
                grad_k_ptr=grad_k,
                partial_q_ptr=partial_q,
                partial_k_ptr=partial_k,
                stride_grad_q_out_token=grad_q_out.stride(0),
                stride_grad_k_out_token=grad_k_out.stride(0),
                stride_q_token=q.stride(0),
                stride_k_token=k.stride(0),
                stride_grad_q_token=grad_q.stride(0),
                stride_grad_k_token=grad_k.stride(0),
                num_q_tokens=q.shape[0],
                num_k_tokens=k.shape[0],
                num_q_parts=q_parts,
                tokens_per_program=per_program,
                ROTATE_K=rotate_k,
                EPS=eps,
                WIDTH=q.shape[1],
                HEAD_DIM=head_dim,
                enable_fp_fusion=True,
                **_arguments("backward", q, config),
            )
    return partial_q.sum(0), partial_k.sum(0)

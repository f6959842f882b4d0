"""Full-width RMSNorm and 2-D RoPE of query and key in one pass.

    n = x / sqrt(mean(x^2) + eps)    y = w n    z = (y_0 cos - y_1 sin, y_1 cos + y_0 sin) for every pair of y

Source: arXiv 2504.07963, section 3.3. Shapes: ``T`` tokens, ``C = H * D`` channels. ``rotation`` describes how a token
is split into MAIN and TAIL channels.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rotation import load_high, load_table, tile_and_config, turn


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
    """Normalise one token of one tensor and, with ROTATE, rotate it."""
    high: tl.constexpr = table_ptr.dtype.element_ty
    low: tl.constexpr = out_ptr.dtype.element_ty
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    x_ptr += token.to(tl.int64) * stride_x_token
    out_ptr += token.to(tl.int64) * stride_out_token
    x_main = load_high(x_ptr, main, WIDTH, high)
    x_tail = load_high(x_ptr, tail, WIDTH, high)
    scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) * (1 / WIDTH) + EPS)
    # Rounded to the tensor's dtype as a separate norm would do, whether or not a rotation follows.
    y_main = (load_high(weight_ptr, main, WIDTH, high) * (x_main * scale)).to(low)
    y_tail = (load_high(weight_ptr, tail, WIDTH, high) * (x_tail * scale)).to(low)
    if ROTATE:
        row, column = tl.load(row_ptr + token), tl.load(column_ptr + token)
        table_main = load_table(table_ptr, row, column, main, WIDTH, HEAD_DIM)
        table_tail = load_table(table_ptr, row, column, tail, WIDTH, HEAD_DIM)
        y_main = turn(y_main.to(high), table_main, CONJUGATE=False).to(low)
        y_tail = turn(y_tail.to(high), table_tail, CONJUGATE=False).to(low)
    tl.store(out_ptr + main, y_main, mask=main < WIDTH)
    tl.store(out_ptr + tail, y_tail, mask=tail < WIDTH)


@triton.jit
def _rope2d_forward_kernel(
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
    """One program per token: first the tokens of q, then those of k."""
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
    """Fill ``q_out`` and ``k_out``; every ``[T, C]`` tensor has dense channels and its own token stride."""
    programs = q.shape[0] + k.shape[0]
    if programs == 0:
        return
    with torch.cuda.device_of(q):
        _rope2d_forward_kernel[(programs,)](
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
            **tile_and_config("forward", q, config),
        )

"""Gradients of norm and rotation (``forward``) with respect to query, key and both weights.

    dy = dz rotated back   dn = w dy    dx = (dn - n mean(dn n)) / sqrt(mean(x^2) + eps)    dw = sum over tokens of n dy

Each program handles consecutive tokens and writes one row of partial sums of dw; a second pass adds the rows.
There are no atomics, so the sums have the same bits in every run.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rotation import load_high, load_table, tile_and_config, turn

MAX_PARTIALS = 1024  # rows of partial weight gradients per backward, for q and k together (plus one if both are ragged)


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
    """Compute gradients for the ``part``-th run of tokens of one tensor, and their contribution to the weight's."""
    high: tl.constexpr = table_ptr.dtype.element_ty
    low: tl.constexpr = grad_x_ptr.dtype.element_ty
    main, tail = tl.arange(0, MAIN), MAIN + tl.arange(0, TAIL)
    weight_main = load_high(weight_ptr, main, WIDTH, high)
    weight_tail = load_high(weight_ptr, tail, WIDTH, high)
    sum_main = tl.zeros([MAIN], dtype=high)
    sum_tail = tl.zeros([TAIL], dtype=high)
    first = part.to(tl.int64) * tokens_per_program
    for token in range(first, tl.minimum(first + tokens_per_program, num_tokens)):
        x_main = load_high(x_ptr + token * stride_x_token, main, WIDTH, high)
        x_tail = load_high(x_ptr + token * stride_x_token, tail, WIDTH, high)
        grad_main = load_high(grad_ptr + token * stride_grad_token, main, WIDTH, high)
        grad_tail = load_high(grad_ptr + token * stride_grad_token, tail, WIDTH, high)
        if ROTATE:
            row, column = tl.load(row_ptr + token), tl.load(column_ptr + token)
            table_main = load_table(table_ptr, row, column, main, WIDTH, HEAD_DIM)
            table_tail = load_table(table_ptr, row, column, tail, WIDTH, HEAD_DIM)
            grad_main = turn(grad_main, table_main, CONJUGATE=True)
            grad_tail = turn(grad_tail, table_tail, CONJUGATE=True)
        scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) * (1 / WIDTH) + EPS)
        x_main, x_tail = x_main * scale, x_tail * scale
        sum_main += grad_main * x_main
        sum_tail += grad_tail * x_tail
        grad_main, grad_tail = grad_main * weight_main, grad_tail * weight_tail
        along = (tl.sum(grad_main * x_main) + tl.sum(grad_tail * x_tail)) * (1 / WIDTH)
        out_ptr = grad_x_ptr + token * stride_grad_x_token
        tl.store(out_ptr + main, (scale * (grad_main - x_main * along)).to(low), mask=main < WIDTH)
        tl.store(out_ptr + tail, (scale * (grad_tail - x_tail * along)).to(low), mask=tail < WIDTH)
    partial_ptr += part.to(tl.int64) * WIDTH
    tl.store(partial_ptr + main, sum_main, mask=main < WIDTH)
    tl.store(partial_ptr + tail, sum_tail, mask=tail < WIDTH)


@triton.jit
def _rope2d_backward_kernel(
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
    """One program per run of tokens: the first ``num_q_parts`` programs work on q, the others on k."""
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
    """Fill ``grad_q`` and ``grad_k``, and return the weights' gradients ``[C]`` in the table's dtype.

    Each program writes one row of partial sums; a second pass adds the rows. The assignment of tokens to programs
    depends only on their number, so the sums have the same bits in every run.
    """
    per_program = max(triton.cdiv(q.shape[0] + k.shape[0], MAX_PARTIALS), 1)
    q_parts, k_parts = triton.cdiv(q.shape[0], per_program), triton.cdiv(k.shape[0], per_program)
    partial_q, partial_k = (table.new_empty(parts, q.shape[1]) for parts in (q_parts, k_parts))
    if q_parts + k_parts > 0:
        with torch.cuda.device_of(q):
            _rope2d_backward_kernel[(q_parts + k_parts,)](
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
                **tile_and_config("backward", q, config),
            )
    return partial_q.sum(0), partial_k.sum(0)

"""Backward kernels of softmax attention within the members of a pack.

    P_ij = exp(s_ij - lse_i)    dP_ij = dO_i . v_j    dS_ij = P_ij (dP_ij - delta_i)    delta_i = dO_i . o_i - dlse_i
    dV_j = sum_i P_ij dO_i      dK_j = scale sum_i dS_ij q_i      dQ_i = scale sum_j dS_ij k_j

Three passes: delta; then dK and dV, with a program per tile of keys that loops over the queries; then dQ, with a
program per tile of queries that loops over the keys. Each sum is computed by one program in a fixed order, without
atomics, so every run has the same bits; the price is that S and dP are computed twice. The pass for dK and dV works on
transposed tiles (keys are rows), so that its left operands, P^T and dS^T, stay in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import (
    LOG2_E,
    Lanes,
    accumulate,
    configuration,
    is_aligned,
    load_rows,
    load_statistics,
    member_of,
    products,
    shape_class,
    store_rows,
    strides,
    zeros,
)


@triton.jit
def _delta_kernel(
    grad_ptr,
    out_ptr,
    grad_lse_ptr,
    delta_ptr,
    stride_grad_token,
    stride_out_token,
    stride_grad_lse_head,
    stride_delta_head,
    num_tokens,
    UNIT: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program per tile of tokens, regardless of their members, and head."""
    high: tl.constexpr = delta_ptr.dtype.element_ty
    unit = tl.full([], UNIT, dtype=tl.int64)
    head = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    grad_ptr += first * (stride_grad_token * unit) + head * HEAD_DIM
    out_ptr += first * (stride_out_token * unit) + head * HEAD_DIM
    rows = tl.arange(0, BLOCK_M)
    limit = num_tokens - first
    g_main, g_tail = load_rows(
        grad_ptr, rows * (stride_grad_token * unit), rows, limit, HEAD_DIM, MAIN, TAIL, MASK_ROWS=True
    )
    o_main, o_tail = load_rows(
        out_ptr, rows * (stride_out_token * unit), rows, limit, HEAD_DIM, MAIN, TAIL, MASK_ROWS=True
    )
    delta = tl.sum(g_main.to(high) * o_main.to(high), 1)
    if TAIL > 0:
        delta += tl.sum(g_tail.to(high) * o_tail.to(high), 1)
    if HAS_GRAD_LSE:
        place = grad_lse_ptr + head.to(tl.int64) * stride_grad_lse_head + first + rows
        delta -= tl.load(place, mask=rows < limit, other=0.0)
    tl.store(delta_ptr + head.to(tl.int64) * stride_delta_head + first + rows, delta, mask=rows < limit)


@triton.jit
def _turn_over_queries(
    k_main,
    k_tail,
    v_main,
    v_tail,
    dk_main,
    dk_tail,
    dv_main,
    dv_tail,
    q_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    q_offsets,
    grad_offsets,
    rows,
    limit,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the contribution of a tile of queries, of which the first ``limit`` are valid, to a key tile's dK and dV."""
    high: tl.constexpr = dk_main.dtype
    q_main, q_tail = load_rows(q_ptr, q_offsets, rows, limit, HEAD_DIM, MAIN, TAIL, MASKED)
    g_main, g_tail = load_rows(grad_ptr, grad_offsets, rows, limit, HEAD_DIM, MAIN, TAIL, MASKED)
    lse, delta = load_statistics(lse_ptr, delta_ptr, rows, limit, MASKED)
    s = products(k_main, k_tail, q_main, q_tail, TAIL, high)
    p = tl.math.exp2(s * (SCALE * LOG2_E) - lse[None, :])
    dp = products(v_main, v_tail, g_main, g_tail, TAIL, high)
    dv_main, dv_tail = accumulate(dv_main, dv_tail, p.to(g_main.dtype), g_main, g_tail, TAIL, high)
    ds = (p * (dp - delta[None, :])).to(q_main.dtype)
    dk_main, dk_tail = accumulate(dk_main, dk_tail, ds, q_main, q_tail, TAIL, high)
    return dk_main, dk_tail, dv_main, dv_tail


@triton.jit
def _backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    cu_q_ptr,
    cu_k_ptr,
    dk_ptr,
    dv_ptr,
    stride_q_token,
    stride_k_token,
    stride_v_token,
    stride_grad_token,
    stride_dk_token,
    stride_dv_token,
    stride_lse_head,
    num_tiles,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program per member, head and tile of keys; every member has as many tiles as the longest one."""
    high: tl.constexpr = lse_ptr.dtype.element_ty
    tile, head, q_start, q_len, k_start, k_len = member_of(tl.program_id(0), cu_q_ptr, cu_k_ptr, num_tiles, NUM_HEADS)
    first = tile * BLOCK_N
    if first >= k_len:
        return
    unit = tl.full([], UNIT, dtype=tl.int64)
    stride_q, stride_grad = stride_q_token * unit, stride_grad_token * unit
    q_ptr += q_start * stride_q + head * HEAD_DIM
    grad_ptr += q_start * stride_grad + head * HEAD_DIM
    k_ptr += (k_start + first) * (stride_k_token * unit) + head * HEAD_DIM
    v_ptr += (k_start + first) * (stride_v_token * unit) + head * HEAD_DIM
    dk_ptr += (k_start + first) * (stride_dk_token * unit) + head * HEAD_DIM
    dv_ptr += (k_start + first) * (stride_dv_token * unit) + head * HEAD_DIM
    lse_ptr += head.to(tl.int64) * stride_lse_head + q_start
    delta_ptr += head.to(tl.int64) * stride_lse_head + q_start
    keys = tl.arange(0, BLOCK_N)
    limit = k_len - first
    k_main, k_tail = load_rows(k_ptr, keys * (stride_k_token * unit), keys, limit, HEAD_DIM, MAIN, TAIL, not ALIGNED)
    v_main, v_tail = load_rows(v_ptr, keys * (stride_v_token * unit), keys, limit, HEAD_DIM, MAIN, TAIL, not ALIGNED)

    dk_main, dk_tail = zeros(BLOCK_N, MAIN, TAIL, high)
    dv_main, dv_tail = zeros(BLOCK_N, MAIN, TAIL, high)
    rows = tl.arange(0, BLOCK_M)
    q_offsets, grad_offsets = rows * stride_q, rows * stride_grad
    whole = q_len // BLOCK_M * BLOCK_M
    for start in tl.range(0, whole, BLOCK_M):
        dk_main, dk_tail, dv_main, dv_tail = _turn_over_queries(
            k_main, k_tail, v_main, v_tail, dk_main, dk_tail, dv_main, dv_tail, q_ptr, grad_ptr,
            lse_ptr + start, delta_ptr + start, q_offsets, grad_offsets, rows, BLOCK_M,
            SCALE, HEAD_DIM, MAIN, TAIL, False,
        )  # fmt: skip
        q_ptr += BLOCK_M * stride_q
        grad_ptr += BLOCK_M * stride_grad
    if not ALIGNED:  # noqa: SIM102 (decided at compile time)
        if whole < q_len:
            dk_main, dk_tail, dv_main, dv_tail = _turn_over_queries(
                k_main, k_tail, v_main, v_tail, dk_main, dk_tail, dv_main, dv_tail, q_ptr, grad_ptr,
                lse_ptr + whole, delta_ptr + whole, q_offsets, grad_offsets, rows, q_len - whole,
                SCALE, HEAD_DIM, MAIN, TAIL, True,
            )  # fmt: skip
    store_rows(
        dk_ptr, keys * (stride_dk_token * unit), keys, limit, dk_main * SCALE, dk_tail * SCALE,
        HEAD_DIM, MAIN, TAIL, not ALIGNED,
    )  # fmt: skip
    store_rows(
        dv_ptr, keys * (stride_dv_token * unit), keys, limit, dv_main, dv_tail, HEAD_DIM, MAIN, TAIL, not ALIGNED
    )


@triton.jit
def _turn_over_keys(
    q_main,
    q_tail,
    g_main,
    g_tail,
    lse,
    delta,
    dq_main,
    dq_tail,
    k_ptr,
    v_ptr,
    k_offsets,
    v_offsets,
    keys,
    limit,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the contribution of a tile of keys, of which the first ``limit`` are valid, to a query tile's dQ."""
    high: tl.constexpr = dq_main.dtype
    k_main, k_tail = load_rows(k_ptr, k_offsets, keys, limit, HEAD_DIM, MAIN, TAIL, MASKED)
    v_main, v_tail = load_rows(v_ptr, v_offsets, keys, limit, HEAD_DIM, MAIN, TAIL, MASKED)
    s = products(q_main, q_tail, k_main, k_tail, TAIL, high)
    if MASKED:
        # An invalid key reads as 0, but exp(0 - lse) may be infinite.
        s = tl.where((keys < limit)[None, :], s, float("-inf"))
    p = tl.math.exp2(s * (SCALE * LOG2_E) - lse[:, None])
    dp = products(g_main, g_tail, v_main, v_tail, TAIL, high)
    ds = (p * (dp - delta[:, None])).to(k_main.dtype)
    return accumulate(dq_main, dq_tail, ds, k_main, k_tail, TAIL, high)


@triton.jit
def _backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    cu_q_ptr,
    cu_k_ptr,
    dq_ptr,
    stride_q_token,
    stride_k_token,
    stride_v_token,
    stride_grad_token,
    stride_dq_token,
    stride_lse_head,
    num_tiles,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One program per member, head and tile of queries; every member has as many tiles as the longest one."""
    high: tl.constexpr = lse_ptr.dtype.element_ty
    tile, head, q_start, q_len, k_start, k_len = member_of(tl.program_id(0), cu_q_ptr, cu_k_ptr, num_tiles, NUM_HEADS)
    first = tile * BLOCK_M
    if first >= q_len:
        return
    unit = tl.full([], UNIT, dtype=tl.int64)
    stride_k, stride_v = stride_k_token * unit, stride_v_token * unit
    q_ptr += (q_start + first) * (stride_q_token * unit) + head * HEAD_DIM
    grad_ptr += (q_start + first) * (stride_grad_token * unit) + head * HEAD_DIM
    dq_ptr += (q_start + first) * (stride_dq_token * unit) + head * HEAD_DIM
    k_ptr += k_start * stride_k + head * HEAD_DIM
    v_ptr += k_start * stride_v + head * HEAD_DIM
    lse_ptr += head.to(tl.int64) * stride_lse_head + q_start + first
    delta_ptr += head.to(tl.int64) * stride_lse_head + q_start + first
    rows = tl.arange(0, BLOCK_M)
    limit = q_len - first
    q_main, q_tail = load_rows(q_ptr, rows * (stride_q_token * unit), rows, limit, HEAD_DIM, MAIN, TAIL, not ALIGNED)
    g_main, g_tail = load_rows(
        grad_ptr, rows * (stride_grad_token * unit), rows, limit, HEAD_DIM, MAIN, TAIL, not ALIGNED
    )
    lse, delta = load_statistics(lse_ptr, delta_ptr, rows, limit, not ALIGNED)

    dq_main, dq_tail = zeros(BLOCK_M, MAIN, TAIL, high)
    keys = tl.arange(0, BLOCK_N)
    k_offsets, v_offsets = keys * stride_k, keys * stride_v
    whole = k_len // BLOCK_N * BLOCK_N
    for _ in tl.range(0, whole, BLOCK_N):
        dq_main, dq_tail = _turn_over_keys(
            q_main, q_tail, g_main, g_tail, lse, delta, dq_main, dq_tail, k_ptr, v_ptr, k_offsets, v_offsets,
            keys, BLOCK_N, SCALE, HEAD_DIM, MAIN, TAIL, False,
        )  # fmt: skip
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    if not ALIGNED:  # noqa: SIM102 (decided at compile time)
        if whole < k_len:
            dq_main, dq_tail = _turn_over_keys(
                q_main, q_tail, g_main, g_tail, lse, delta, dq_main, dq_tail, k_ptr, v_ptr, k_offsets, v_offsets,
                keys, k_len - whole, SCALE, HEAD_DIM, MAIN, TAIL, True,
            )  # fmt: skip
    store_rows(
        dq_ptr, rows * (stride_dq_token * unit), rows, limit, dq_main * SCALE, dq_tail * SCALE,
        HEAD_DIM, MAIN, TAIL, not ALIGNED,
    )  # fmt: skip


def launch_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    multiple_of: int = 1,
    configs: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Fill ``dq [T, H, D]``, ``dk`` and ``dv [L, H, D]``; in every tensor but the lses the heads of a token are dense.

    Args:
        grad: gradient of ``out``.
        grad_lse: gradient of ``lse``, ``[H, T]`` with dense tokens; None for zero.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale: as in the forward pass.
        out, lse: results of the forward pass.
        dq, dk, dv: filled.
        multiple_of: divides every length of queries and of keys.
        configs: launch configurations of ``delta``, ``keys`` and ``queries`` to use instead of the frozen ones.
    """
    heads, head_dim = q.shape[1:]
    members = cu_seqlens_q.shape[0] - 1
    if members == 0:
        return
    name = shape_class(q.dtype, head_dim)
    delta_options, keys_options, queries_options = (
        configuration(f"backward_{part}", q, name, None if configs is None else configs[part])
        for part in ("delta", "keys", "queries")
    )
    delta = torch.empty_strided(lse.shape, lse.stride(), dtype=lse.dtype, device=lse.device)  # same strides
    lanes = Lanes.of(head_dim)
    sizes = {"HEAD_DIM": head_dim, "MAIN": lanes.main, "TAIL": lanes.tail, "enable_fp_fusion": True}
    common = sizes | {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "grad_ptr": grad,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "cu_q_ptr": cu_seqlens_q,
        "cu_k_ptr": cu_seqlens_k,
        "stride_lse_head": lse.stride(0),
        "SCALE": softmax_scale,
        "NUM_HEADS": heads,
    }
    with torch.cuda.device_of(q):
        if q.shape[0] > 0:
            _delta_kernel[(triton.cdiv(q.shape[0], delta_options["BLOCK_M"]), heads)](
                grad_ptr=grad,
                out_ptr=out,
                grad_lse_ptr=lse if grad_lse is None else grad_lse,
                delta_ptr=delta,
                stride_grad_lse_head=lse.stride(0) if grad_lse is None else grad_lse.stride(0),
                stride_delta_head=delta.stride(0),
                num_tokens=q.shape[0],
                HAS_GRAD_LSE=grad_lse is not None,
                **strides(grad=grad, out=out),
                **sizes,
                **delta_options,
            )
        if k.shape[0] > 0:
            num_tiles = triton.cdiv(max_seqlen_k, keys_options["BLOCK_N"])
            _backward_keys_kernel[(members * heads * num_tiles,)](
                dk_ptr=dk,
                dv_ptr=dv,
                num_tiles=num_tiles,
                ALIGNED=is_aligned(multiple_of, keys_options),
                **strides(q=q, k=k, v=v, grad=grad, dk=dk, dv=dv),
                **common,
                **keys_options,
            )
        if q.shape[0] > 0:
            num_tiles = triton.cdiv(max_seqlen_q, queries_options["BLOCK_M"])
            _backward_queries_kernel[(members * heads * num_tiles,)](
                dq_ptr=dq,
                num_tiles=num_tiles,
                ALIGNED=is_aligned(multiple_of, queries_options),
                **strides(q=q, k=k, v=v, grad=grad, dq=dq),
                **common,
                **queries_options,
            )

"""Forward kernel of softmax attention within the members of a pack.

    s_ij = scale q_i . k_j    o_i = sum_j exp(s_ij - lse_i) v_j    lse_i = log sum_j exp(s_ij)

Source: arXiv 2504.07963, section 3.3 (attention never crosses an image); tiled with a running maximum and sum. A
program handles one tile of a member's queries and one head, and loops over the keys of that member. Exponentials are
taken to base 2 of logits scaled by log2(e), in the same multiply-add that subtracts the maximum.

At head dim 72, the exponentials and the operations around them cost about as much as the products, so the number of
instructions matters:

- Row sums are free: the dead lanes of V are read from a constant one, so the product P V leaves the row sum in the
  first dead lane. (The weights are summed as they are multiplied, that is, rounded to the dtype of V.)
- Long members (``FIXED_MAX_TILES`` tiles of keys or more) subtract the maximum of their first tile throughout. Any
  value near the maximum serves, and this removes the maximum and the rescaling from the loop. Later logits may be
  larger; if a sum exceeds ``GROWTH``, the tile is recomputed with a running maximum. No additional underflow arises:
  the value subtracted is the logit of one of the row's keys, so the sum is at least 1.
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
    load_part,
    load_rows,
    member_of,
    products,
    shape_class,
    store_rows,
    strides,
    zeros,
)

# Limit of a row sum, relative to the maximum of its first tile, beyond which the tile is recomputed. It is far below
# where weights in the dtype of V, or their products with V, overflow.
GROWTH = {torch.float16: 2.0**15, torch.bfloat16: 2.0**64, torch.float32: 2.0**64, torch.float64: 2.0**64}
MAX_DEAD_LANES = 128
LN_2 = tl.constexpr(0.6931471805599453)

_ones: dict[tuple[torch.device, torch.dtype], Tensor] = {}


@triton.jit
def _load_values_part(
    v_ptr, one_ptr, offsets, lanes, rows, limit, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr, DEAD: tl.constexpr
):
    """Load one part of a tile of V, with ones in its dead lanes.

    The ones are loaded from memory like the rest, so the whole tile can be copied to shared memory asynchronously.
    Inserting them afterwards would cost a round trip through registers and a barrier.
    """
    if DEAD:
        place = v_ptr + offsets[:, None] + lanes[None, :]
        place = tl.where((lanes < HEAD_DIM)[None, :], place, one_ptr + (lanes - HEAD_DIM)[None, :])
        if MASK_ROWS:  # noqa: SIM108
            x = tl.load(place, mask=(rows < limit)[:, None], other=0.0)
        else:
            x = tl.load(place)
    else:
        x = load_part(v_ptr, offsets, lanes, rows, limit, HEAD_DIM, MASK_ROWS, False)
    return x


@triton.jit
def _turn(
    q_main,
    q_tail,
    acc_main,
    acc_tail,
    row_max,
    row_sum,
    k_ptr,
    v_ptr,
    one_ptr,
    k_offsets,
    v_offsets,
    rows,
    limit,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
    FIXED_MAX: tl.constexpr,
):
    """Process one tile of keys, of which the first ``limit`` are valid."""
    high: tl.constexpr = row_max.dtype
    scale_log2: tl.constexpr = SCALE * LOG2_E
    k_main, k_tail = load_rows(k_ptr, k_offsets, rows, limit, HEAD_DIM, MAIN, TAIL, MASKED)
    s = products(q_main, q_tail, k_main, k_tail, TAIL, high)
    if MASKED:
        s = tl.where((rows < limit)[None, :], s, float("-inf"))
    if not FIXED_MAX:
        # Every tile has a valid key, so the new maximum is finite and no two infinities are subtracted.
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        shrink = tl.math.exp2(row_max - new_max)
        row_max = new_max
        acc_main *= shrink[:, None]
        acc_tail *= shrink[:, None]
        row_sum *= shrink
    p = tl.math.exp2(s * scale_log2 - row_max[:, None])
    if MAIN + TAIL == HEAD_DIM:
        row_sum += tl.sum(p, 1)
    v_main = _load_values_part(
        v_ptr, one_ptr, v_offsets, tl.arange(0, MAIN), rows, limit, HEAD_DIM, MASKED, MAIN > HEAD_DIM
    )
    v_tail = v_main
    if TAIL > 0:
        lanes = MAIN + tl.arange(0, TAIL)
        v_tail = _load_values_part(
            v_ptr, one_ptr, v_offsets, lanes, rows, limit, HEAD_DIM, MASKED, MAIN + TAIL > HEAD_DIM
        )
    acc_main, acc_tail = accumulate(acc_main, acc_tail, p.to(v_main.dtype), v_main, v_tail, TAIL, high)
    return acc_main, acc_tail, row_max, row_sum


@triton.jit
def _walk(
    q_main,
    q_tail,
    row_max,
    k_ptr,
    v_ptr,
    one_ptr,
    stride_k,
    stride_v,
    k_len,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIXED_MAX: tl.constexpr,
):
    """Loop over all keys of a member: whole tiles without masks, then the rest, always with a running maximum."""
    high: tl.constexpr = row_max.dtype
    acc_main, acc_tail = zeros(BLOCK_M, MAIN, TAIL, high)
    row_sum = tl.zeros([BLOCK_M], dtype=high)
    rows = tl.arange(0, BLOCK_N)
    k_offsets, v_offsets = rows.to(tl.int64) * stride_k, rows.to(tl.int64) * stride_v
    whole = k_len // BLOCK_N * BLOCK_N
    for _ in tl.range(0, whole, BLOCK_N):
        acc_main, acc_tail, row_max, row_sum = _turn(
            q_main, q_tail, acc_main, acc_tail, row_max, row_sum, k_ptr, v_ptr, one_ptr, k_offsets, v_offsets,
            rows, BLOCK_N, SCALE, HEAD_DIM, MAIN, TAIL, False, FIXED_MAX,
        )  # fmt: skip
        k_ptr += BLOCK_N * stride_k
        v_ptr += BLOCK_N * stride_v
    if not ALIGNED:  # noqa: SIM102 (decided at compile time)
        if whole < k_len:
            acc_main, acc_tail, row_max, row_sum = _turn(
                q_main, q_tail, acc_main, acc_tail, row_max, row_sum, k_ptr, v_ptr, one_ptr, k_offsets, v_offsets,
                rows, k_len - whole, SCALE, HEAD_DIM, MAIN, TAIL, True, False,
            )  # fmt: skip
    if MAIN > HEAD_DIM:
        row_sum = tl.sum(tl.where((tl.arange(0, MAIN) == HEAD_DIM)[None, :], acc_main, 0.0), 1)
    elif MAIN + TAIL > HEAD_DIM:
        row_sum = tl.sum(tl.where((MAIN + tl.arange(0, TAIL) == HEAD_DIM)[None, :], acc_tail, 0.0), 1)
    return acc_main, acc_tail, row_max, row_sum


@triton.jit
def _attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    one_ptr,
    cu_q_ptr,
    cu_k_ptr,
    out_ptr,
    lse_ptr,
    stride_q_token,
    stride_k_token,
    stride_v_token,
    stride_out_token,
    stride_lse_head,
    num_tiles,
    UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    GROWTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIXED_MAX_TILES: tl.constexpr,
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
    out_ptr += (q_start + first) * (stride_out_token * unit) + head * HEAD_DIM
    lse_ptr += head.to(tl.int64) * stride_lse_head + q_start + first
    k_ptr += k_start * stride_k + head * HEAD_DIM
    v_ptr += k_start * stride_v + head * HEAD_DIM
    rows = tl.arange(0, BLOCK_M)
    limit = q_len - first
    q_main, q_tail = load_rows(q_ptr, rows * (stride_q_token * unit), rows, limit, HEAD_DIM, MAIN, TAIL, not ALIGNED)

    nothing = tl.full([BLOCK_M], float("-inf"), dtype=high)
    if FIXED_MAX_TILES == 0:
        acc_main, acc_tail, row_max, row_sum = _walk(
            q_main, q_tail, nothing, k_ptr, v_ptr, one_ptr, stride_k, stride_v, k_len,
            SCALE, HEAD_DIM, MAIN, TAIL, BLOCK_M, BLOCK_N, ALIGNED, False,
        )  # fmt: skip
    else:
        acc_main, acc_tail = zeros(BLOCK_M, MAIN, TAIL, high)
        row_max, row_sum = nothing, tl.full([BLOCK_M], float("inf"), dtype=high)
        if k_len >= FIXED_MAX_TILES * BLOCK_N:
            k_rows = tl.arange(0, BLOCK_N)
            k_main, k_tail = load_rows(k_ptr, k_rows * stride_k, k_rows, BLOCK_N, HEAD_DIM, MAIN, TAIL, False)
            row_max = tl.max(products(q_main, q_tail, k_main, k_tail, TAIL, high), 1) * (SCALE * LOG2_E)
            acc_main, acc_tail, row_max, row_sum = _walk(
                q_main, q_tail, row_max, k_ptr, v_ptr, one_ptr, stride_k, stride_v, k_len,
                SCALE, HEAD_DIM, MAIN, TAIL, BLOCK_M, BLOCK_N, ALIGNED, True,
            )  # fmt: skip
        # Not computed yet, or beyond the limit; NaN counts as beyond.
        if tl.max(tl.where(row_sum < GROWTH, 0, 1), 0) > 0:
            acc_main, acc_tail, row_max, row_sum = _walk(
                q_main, q_tail, nothing, k_ptr, v_ptr, one_ptr, stride_k, stride_v, k_len,
                SCALE, HEAD_DIM, MAIN, TAIL, BLOCK_M, BLOCK_N, ALIGNED, False,
            )  # fmt: skip

    # A member without keys has sum 0 and maximum minus infinity, so its output is 0 and its lse minus infinity.
    row_sum = tl.where(row_sum == 0, 1.0, row_sum)
    share = (1.0 / row_sum)[:, None]
    offsets = rows * (stride_out_token * unit)
    store_rows(out_ptr, offsets, rows, limit, acc_main * share, acc_tail * share, HEAD_DIM, MAIN, TAIL, not ALIGNED)
    lse = (row_max + tl.math.log2(row_sum)) * LN_2
    if ALIGNED:
        tl.store(lse_ptr + rows, lse)
    else:
        tl.store(lse_ptr + rows, lse, mask=rows < limit)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    multiple_of: int = 1,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out [T, H, D]`` and ``lse [H, T]``; in every tensor except ``lse`` the heads of a token are dense.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale: as in :func:`~.op.varlen_attention`.
        out, lse: filled.
        multiple_of: divides every length of queries and of keys.
        config: launch configuration to use instead of the frozen one.
    """
    tokens, heads, head_dim = q.shape
    members = cu_seqlens_q.shape[0] - 1
    if tokens == 0 or members == 0:
        return
    options = configuration("forward", q, shape_class(q.dtype, head_dim, max_seqlen_q), config)
    lanes = Lanes.of(head_dim)
    num_tiles = triton.cdiv(max_seqlen_q, options["BLOCK_M"])
    options.setdefault("FIXED_MAX_TILES", 0)
    with torch.cuda.device_of(q):
        _attention_forward_kernel[(members * heads * num_tiles,)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            one_ptr=_one(q),
            cu_q_ptr=cu_seqlens_q,
            cu_k_ptr=cu_seqlens_k,
            out_ptr=out,
            lse_ptr=lse,
            stride_lse_head=lse.stride(0),
            num_tiles=num_tiles,
            SCALE=softmax_scale,
            GROWTH=GROWTH[q.dtype],
            NUM_HEADS=heads,
            HEAD_DIM=head_dim,
            MAIN=lanes.main,
            TAIL=lanes.tail,
            ALIGNED=is_aligned(multiple_of, options),
            enable_fp_fusion=True,
            **strides(q=q, k=k, v=v, out=out),
            **options,
        )


def _one(x: Tensor) -> Tensor:
    """Return ones in the dtype and on the device of ``x``; they are created once and cached."""
    found = _ones.get((x.device, x.dtype))
    if found is None:
        found = torch.ones(MAX_DEAD_LANES, dtype=x.dtype, device=x.device)
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return found  # not cached, because its memory belongs to the graph
            torch.cuda.current_stream(x.device).synchronize()  # once, so that any stream may read it afterwards
        _ones[x.device, x.dtype] = found
    return found

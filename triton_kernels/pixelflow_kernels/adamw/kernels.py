"""Kernels for gradient norm, AdamW and moving average of all tensors of a model, in four launches.

    m += (1 - b1) (g - m)      v += (1 - b2) (g^2 - v)
    p -= lr wd p + lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)      average += w (p - average)

Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

For the norm, every program writes the sum of squares of its chunk, and a second kernel adds these in order; all in
float64, in which the square of a float32 value is exact and never overflows. Then one program computes the scalars of
the step, which the update reads on the device. Nothing is read on the host: whether a step is applied is decided on the
device. The update is level A: every float32 operation rounds separately; square roots and quotients are correctly
rounded.

A program finds its tensors by their addresses in a table (``table``). Complete blocks are read 16 bytes at a time if
all tensors are aligned to 16 bytes; everything else is read value by value, with masks.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config
from pixelflow_kernels.rounding import apart

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
COUNT_OF_NUMBERS = 9
LARGEST_NORM = tl.constexpr(2.0**63)  # limit of the clipped norm, so that squares are finite in float32
EXPONENT_BITS = tl.constexpr(40)  # bits of the number of steps

# Rows of the table, in this order. Rows for the average and the copy follow from OTHERS on, if present.
GRADIENT = tl.constexpr(0)
PARAMETER = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
OTHERS = tl.constexpr(4)


# --- device functions --------------------------------------------------------------------------------------


@triton.jit
def _chunk(chunks_ptr):
    """Return the index of this program's tensor, its first value in it, and its number of values."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    number = tl.load(chunks_ptr + chunk)
    start = tl.load(chunks_ptr + chunks + chunk)
    return number, start, tl.load(chunks_ptr + 2 * chunks + chunk).to(tl.int32)


@triton.jit
def _at(address, start, places, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to values of a tensor whose address is given as an integer."""
    pointers = address.to(tl.pointer_type(TYPE)) + start + places
    if ALIGNED:
        # A hint on the address would be lost when the integer is converted to a pointer.
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), places.shape[0])
    return pointers


@triton.jit
def _power(base, exponent):
    """Compute ``base ** exponent`` in float64 by squaring, lowest bit first."""
    result = tl.full([], 1.0, tl.float64)
    for _ in tl.static_range(EXPONENT_BITS):
        result = tl.where(exponent & 1 != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


# --- norm --------------------------------------------------------------------------------------------------


@triton.jit
def _squares_kernel(pointers_ptr, chunks_ptr, partial_ptr, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one float64 sum of squares per chunk."""
    number, start, count = _chunk(chunks_ptr)
    address = tl.load(pointers_ptr + number)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    whole = tl.where(address & 15 == 0, count // BLOCK, 0)
    for block in range(whole):
        places = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(_at(address, start, places, TYPE, True)).to(tl.float64)
        total += x * x
    for block in range(whole, tl.cdiv(count, BLOCK)):
        places = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(_at(address, start, places, TYPE, False), mask=places < count, other=0.0).to(tl.float64)
        total += x * x
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _norm_kernel(partial_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    """Compute the square root of the total of the chunks' sums, as float32."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + places, mask=places < count, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total)).to(tl.float32))


# --- update ------------------------------------------------------------------------------------------------


@triton.jit
def _numbers_kernel(
    norm_ptr,
    lr_ptr,
    counters_ptr,
    numbers_ptr,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    max_norm: tl.float64,
    ema_decay: tl.float64,
):
    """Compute the scalars of this step in float64, each rounded to float32 once, and count the step."""
    # Python numbers stay float64 only as operands, not as function arguments: see the pitfalls in docs/kernels.md.
    one = tl.full([], 1.0, tl.float64)
    norm, lr = tl.load(norm_ptr).to(tl.float64), tl.load(lr_ptr).to(tl.float64)
    taken = tl.load(counters_ptr)
    clip = max_norm / (norm + tl.full([], 1e-6, tl.float64))
    clip = tl.where(clip < one, clip, one)
    applied = clip * norm < LARGEST_NORM  # false for a NaN or infinite norm
    decay = (one + taken) / (one * 10.0 + taken)
    decay = tl.where(ema_decay < decay, one * ema_decay, decay)
    tl.store(numbers_ptr, applied.to(tl.float32))
    tl.store(numbers_ptr + 1, clip.to(tl.float32))
    tl.store(numbers_ptr + 2, (one - beta1).to(tl.float32))
    tl.store(numbers_ptr + 3, (one - beta2).to(tl.float32))
    tl.store(numbers_ptr + 4, (lr / (one - _power(one * beta1, taken + 1))).to(tl.float32))
    tl.store(numbers_ptr + 5, (one / tl.sqrt(one - _power(one * beta2, taken + 1))).to(tl.float32))
    tl.store(numbers_ptr + 6, (one * eps).to(tl.float32))
    tl.store(numbers_ptr + 7, (lr * weight_decay).to(tl.float32))
    tl.store(numbers_ptr + 8, (one - decay).to(tl.float32))
    applied = applied.to(tl.int64)
    tl.store(counters_ptr, taken + applied)
    tl.store(counters_ptr + 1, tl.load(counters_ptr + 1) + 1 - applied)
    tl.store(counters_ptr + 2, (tl.load(counters_ptr + 2) + 1) * (1 - applied))


@triton.jit
def _moved(average, weight, value, APART: tl.constexpr):
    """Compute ``average + weight (value - average)``."""
    change = weight * (value - average)
    if APART:
        change = apart(change)
    return average + change


@triton.jit
def _update_block(
    pointers_ptr,
    number,
    tensors,
    start,
    places,
    mask,
    numbers_ptr,
    GRADIENT_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
    ZEROED: tl.constexpr,
    APART: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update one block of one tensor of every list, reading and writing each value once."""
    pointers_ptr += number
    f32: tl.constexpr = tl.float32
    gradient_at = _at(tl.load(pointers_ptr + GRADIENT * tensors), start, places, GRADIENT_TYPE, ALIGNED)
    parameter_at = _at(tl.load(pointers_ptr + PARAMETER * tensors), start, places, f32, ALIGNED)
    exp_avg_at = _at(tl.load(pointers_ptr + EXP_AVG * tensors), start, places, f32, ALIGNED)
    exp_avg_sq_at = _at(tl.load(pointers_ptr + EXP_AVG_SQ * tensors), start, places, f32, ALIGNED)
    g = tl.load(gradient_at, mask=mask).to(f32) * tl.load(numbers_ptr + 1)
    p = tl.load(parameter_at, mask=mask)
    m = tl.load(exp_avg_at, mask=mask)
    v = tl.load(exp_avg_sq_at, mask=mask)
    if AVERAGED:
        average_at = _at(tl.load(pointers_ptr + OTHERS * tensors), start, places, f32, ALIGNED)
        average = tl.load(average_at, mask=mask)
    square = g * g
    if APART:
        g = apart(g)
        square = apart(square)
    m = _moved(m, tl.load(numbers_ptr + 2), g, APART)
    v = _moved(v, tl.load(numbers_ptr + 3), square, APART)
    root = tl.sqrt_rn(v) * tl.load(numbers_ptr + 5)
    kept = tl.load(numbers_ptr + 7) * p
    if APART:
        root = apart(root)
        kept = apart(kept)
    p = p - (kept + tl.div_rn(tl.load(numbers_ptr + 4) * m, root + tl.load(numbers_ptr + 6)))
    tl.store(parameter_at, p, mask=mask)
    tl.store(exp_avg_at, m, mask=mask)
    tl.store(exp_avg_sq_at, v, mask=mask)
    if AVERAGED:
        tl.store(average_at, _moved(average, tl.load(numbers_ptr + 8), p, APART), mask=mask)
    if COPY_TYPE is not None:
        copy_at = _at(tl.load(pointers_ptr + (OTHERS + AVERAGED) * tensors), start, places, COPY_TYPE, ALIGNED)
        tl.store(copy_at, p.to(COPY_TYPE), mask=mask)
    if ZEROED:
        tl.store(gradient_at, tl.zeros_like(p).to(GRADIENT_TYPE), mask=mask)


@triton.jit
def _update_kernel(
    pointers_ptr,
    chunks_ptr,
    numbers_ptr,
    tensors,
    LISTS: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr,
    AVERAGED: tl.constexpr,
    ZEROED: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk of every list; in a step that is skipped, only zero the gradients, if ZEROED."""
    number, start, count = _chunk(chunks_ptr)
    addresses = tl.load(pointers_ptr + number)
    for i in tl.static_range(1, LISTS):
        addresses |= tl.load(pointers_ptr + i * tensors + number)
    applied = tl.load(numbers_ptr) != 0
    blocks = tl.where(applied, tl.cdiv(count, BLOCK), 0)
    whole = tl.where(applied & (addresses & 15 == 0), count // BLOCK, 0)
    for block in range(whole):
        places = block * BLOCK + tl.arange(0, BLOCK)
        _update_block(
            pointers_ptr, number, tensors, start, places, None, numbers_ptr,
            GRADIENT_TYPE, COPY_TYPE, AVERAGED, ZEROED, APART, True,
        )  # fmt: skip
    for block in range(whole, blocks):
        places = block * BLOCK + tl.arange(0, BLOCK)
        _update_block(
            pointers_ptr, number, tensors, start, places, places < count, numbers_ptr,
            GRADIENT_TYPE, COPY_TYPE, AVERAGED, ZEROED, APART, False,
        )  # fmt: skip
    if ZEROED:
        for block in range(blocks, tl.cdiv(count, BLOCK)):
            places = block * BLOCK + tl.arange(0, BLOCK)
            at = _at(tl.load(pointers_ptr + number), start, places, GRADIENT_TYPE, False)
            tl.store(at, tl.zeros([BLOCK], GRADIENT_TYPE), mask=places < count)


# --- launches ----------------------------------------------------------------------------------------------


def launch_norm(
    pointers: Tensor,
    chunks: Tensor,
    dtype: torch.dtype,
    norm: Tensor,
    configs: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Fill ``norm``, 0-d float32, from the tensors of the table's first row, which have dtype ``dtype``."""
    arch = arch_of(norm.device)
    found = {name: launch_config(f"adamw.{name}", "all", arch) for name in ("squares", "norm")} | {**(configs or {})}
    count = chunks.shape[1]
    partial = torch.empty(count, dtype=torch.float64, device=norm.device)
    with torch.cuda.device_of(norm):
        if count > 0:
            _squares_kernel[(count,)](
                pointers_ptr=pointers,
                chunks_ptr=chunks,
                partial_ptr=partial,
                TYPE=TYPES[dtype],
                enable_fp_fusion=False,
                **found["squares"],
            )
        _norm_kernel[(1,)](
            partial_ptr=partial, norm_ptr=norm, count=count, enable_fp_fusion=False, **found["norm"]
        )  # fmt: skip


def launch_numbers(
    norm: Tensor,
    lr: Tensor,
    counters: Tensor,
    numbers: Tensor,
    settings: Mapping[str, float],
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``numbers [9]`` float32 and count the step in ``counters [3]``."""
    config = launch_config("adamw.numbers", "all", arch_of(norm.device)) if config is None else config
    with torch.cuda.device_of(norm):
        _numbers_kernel[(1,)](
            norm_ptr=norm,
            lr_ptr=lr,
            counters_ptr=counters,
            numbers_ptr=numbers,
            enable_fp_fusion=False,
            **settings,
            **config,
        )


def launch_update(
    pointers: Tensor,
    chunks: Tensor,
    numbers: Tensor,
    gradient_type: torch.dtype,
    copy_type: torch.dtype | None,
    averaged: bool,
    zeroed: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Update the tensors of the table's rows: gradients, parameters, moments, and averages and copies if present."""
    if chunks.shape[1] == 0:
        return
    arch = arch_of(numbers.device)
    config = launch_config("adamw.update", "all", arch) if config is None else config
    lists, tensors = pointers.shape
    with torch.cuda.device_of(numbers):
        _update_kernel[(chunks.shape[1],)](
            pointers_ptr=pointers,
            chunks_ptr=chunks,
            numbers_ptr=numbers,
            tensors=tensors,
            LISTS=lists,
            GRADIENT_TYPE=TYPES[gradient_type],
            COPY_TYPE=None if copy_type is None else TYPES[copy_type],
            AVERAGED=averaged,
            ZEROED=zeroed,
            APART=(arch or 0) >= 100,
            enable_fp_fusion=False,  # level A
            **config,
        )

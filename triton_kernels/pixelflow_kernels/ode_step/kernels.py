"""Updates of the state by its velocity, and the norms that control their size, each in one pass over memory.

    v = v_null + w (v_cond - v_null)        x1 = x + h v        y = x + sum_i (h w_i) k_i
    ratio = sqrt(mean((sum_i (h e_i) k_i / (atol + rtol max(|x|, |x1|)))^2))

Source: arXiv 2504.07963, section 3.4; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section
II.4.

A program works on one block of one image; where an image ends, its last block is masked, so no block has two images and
an image's bits do not depend on the others. Values of the state are level A: without fused multiply-add every product,
sum and quotient rounds by itself, and ``h w_i`` is a float64 product rounded once, as in eager PyTorch.

A norm takes two passes: every program leaves the sum of its block, a second kernel adds an image's sums in the order of
the blocks. Which values meet when depends on the number of values per image, and on the velocity's type and strides (a
thread's share of a block follows the widest load), not on the batch.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixelflow_kernels.configs import arch_of, launch_config

SMALL_IMAGE = 16384  # values; smaller images have blocks of their own size, so that there are enough of them


# --- parts -------------------------------------------------------------------------------------------------


@triton.jit
def _block(blocks, stride_image, BLOCK: tl.constexpr):
    """This program's image, its places within the image, which of them there are, and where the image begins."""
    image = tl.program_id(0) // blocks
    places = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return image, places, places < stride_image, image.to(tl.int64) * stride_image


@triton.jit
def _apart(product):
    """A float32 product with the same bits, which no compiler can fuse with the sum that it goes into.

    For sm_100, ptxas 12.9 fuses packed products and sums even where it is told not to. So there the bits pass through
    an integer sum with a zero that it does not know to be one: the grid has a single layer.
    """
    if product.dtype == tl.float32:
        product = (product.to(tl.int32, bitcast=True) + tl.program_id(2)).to(tl.float32, bitcast=True)
    return product


@triton.jit
def _velocity(
    velocity_ptr,
    guidance_ptr,
    image,
    places,
    mask,
    stride_image,
    stride_half,
    stride_velocity_row,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    high: tl.constexpr,
):
    """The block's velocity, both halves read once and combined where there are two."""
    if WIDTH == 0:  # contiguous
        velocity_ptr += image.to(tl.int64) * stride_image
        inside = places
    else:  # rows of WIDTH values, further apart than that; an image has whole rows
        velocity_ptr += image.to(tl.int64) * (stride_image // WIDTH) * stride_velocity_row
        inside = (places // WIDTH).to(tl.int64) * stride_velocity_row + places % WIDTH
    null = tl.load(velocity_ptr + inside, mask=mask, other=0.0).to(high)
    if GUIDED:
        conditional = tl.load(velocity_ptr + stride_half + inside, mask=mask, other=0.0).to(high)
        weight = tl.load(guidance_ptr + image * GUIDANCE_PER_IMAGE).to(high)
        change = weight * (conditional - null)
        if APART:
            change = _apart(change)
        null = null + change
    return null


# --- updates -----------------------------------------------------------------------------------------------


@triton.jit
def _euler_kernel(
    x_ptr,
    velocity_ptr,
    step_ptr,
    guidance_ptr,
    out_ptr,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    STEP_PER_IMAGE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = x + step v``; ``out`` may be ``x``."""
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = _block(blocks, stride_image, BLOCK)
    velocity = _velocity(
        velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
        GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
    )  # fmt: skip
    step = tl.load(step_ptr + image * STEP_PER_IMAGE).to(high)
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    change = step * velocity
    if APART:
        change = _apart(change)
    tl.store(out_ptr + start + places, x + change, mask=mask)


@triton.jit
def _stage_kernel(
    x_ptr,
    slopes_ptr,
    velocity_ptr,
    step_ptr,
    guidance_ptr,
    out_ptr,
    stride_slope,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    WEIGHTS: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,
    FRESH: tl.constexpr,
    STEP_PER_IMAGE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = x + sum_i (step w_i) k_i`` over COUNT slopes; the last is the velocity, and stored, where it is FRESH."""
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = _block(blocks, stride_image, BLOCK)
    step = tl.load(step_ptr + image * STEP_PER_IMAGE)
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    slopes_ptr += start
    for i in tl.static_range(COUNT):
        if FRESH and i == COUNT - 1:
            slope = _velocity(
                velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
                GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
            )  # fmt: skip
            tl.store(slopes_ptr + stride_slope.to(tl.int64) * i + places, slope, mask=mask)
        elif WEIGHTS[i] != 0.0:
            slope = tl.load(slopes_ptr + stride_slope.to(tl.int64) * i + places, mask=mask, other=0.0)
        if WEIGHTS[i] != 0.0:
            term = (step * WEIGHTS[i]).to(high) * slope
            if APART:
                term = _apart(term)
            if i == FIRST:  # noqa: SIM108
                total = term
            else:
                total = total + term
    tl.store(out_ptr + start + places, x + total, mask=mask)


@triton.jit
def _accept_kernel(
    x_ptr,
    slopes_ptr,
    solution_ptr,
    accept_ptr,
    stride_slope,
    stride_image,
    blocks,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the accepted images: the solution becomes the state, the LAST slope the first."""
    image, places, mask, start = _block(blocks, stride_image, BLOCK)
    mask = mask & (tl.load(accept_ptr + image) != 0)
    solution = tl.load(solution_ptr + start + places, mask=mask, other=0.0)
    slope = tl.load(slopes_ptr + stride_slope.to(tl.int64) * LAST + start + places, mask=mask, other=0.0)
    tl.store(x_ptr + start + places, solution, mask=mask)
    tl.store(slopes_ptr + start + places, slope, mask=mask)


# --- norms -------------------------------------------------------------------------------------------------


@triton.jit
def _sum_of_squares(error, scale, mask):
    """Of ``error / scale``, float64. Outside of the image the scale may be 0, so its quotient is thrown away."""
    ratio = error / scale
    return tl.sum(tl.where(mask, ratio * ratio, 0.0)).to(tl.float64)


@triton.jit
def _error_kernel(
    x_ptr,
    slopes_ptr,
    velocity_ptr,
    step_ptr,
    guidance_ptr,
    tolerance_ptr,
    partial_ptr,
    stride_slope,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    SOLUTION: tl.constexpr,
    ERROR: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST_OF_SOLUTION: tl.constexpr,
    FIRST_OF_ERROR: tl.constexpr,
    FRESH: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sum of squares per block.

    The solution is summed up once more rather than read: its slopes are at hand.
    """
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = _block(blocks, stride_image, BLOCK)
    step = tl.load(step_ptr + image)
    rtol, atol = tl.load(tolerance_ptr).to(high), tl.load(tolerance_ptr + 1).to(high)
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    slopes_ptr += start
    for i in tl.static_range(COUNT):
        if FRESH and i == COUNT - 1:
            slope = _velocity(
                velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
                GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
            )  # fmt: skip
            tl.store(slopes_ptr + stride_slope.to(tl.int64) * i + places, slope, mask=mask)
        elif SOLUTION[i] != 0.0 or ERROR[i] != 0.0:
            slope = tl.load(slopes_ptr + stride_slope.to(tl.int64) * i + places, mask=mask, other=0.0)
        if SOLUTION[i] != 0.0:
            term = (step * SOLUTION[i]).to(high) * slope
            if APART:
                term = _apart(term)
            if i == FIRST_OF_SOLUTION:  # noqa: SIM108
                change = term
            else:
                change = change + term
        if ERROR[i] != 0.0:
            term = (step * ERROR[i]).to(high) * slope
            if APART:
                term = _apart(term)
            if i == FIRST_OF_ERROR:  # noqa: SIM108
                error = term
            else:
                error = error + term
    # A NaN must reach the norm, or a broken state would pass.
    largest = tl.maximum(tl.abs(x), tl.abs(x + change), propagate_nan=tl.PropagateNan.ALL)
    tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(error, atol + rtol * largest, mask))


@triton.jit
def _start_kernel(
    x_ptr,
    slope_ptr,
    velocity_ptr,
    guidance_ptr,
    tolerance_ptr,
    partial_ptr,
    stride_image,
    stride_half,
    stride_velocity_row,
    blocks,
    PROBE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDANCE_PER_IMAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the first slope and measure state and slope; or, of a PROBE, measure its distance from the first slope."""
    high: tl.constexpr = x_ptr.dtype.element_ty
    image, places, mask, start = _block(blocks, stride_image, BLOCK)
    velocity = _velocity(
        velocity_ptr, guidance_ptr, image, places, mask, stride_image, stride_half, stride_velocity_row,
        GUIDED, GUIDANCE_PER_IMAGE, WIDTH, APART, high,
    )  # fmt: skip
    x = tl.load(x_ptr + start + places, mask=mask, other=0.0)
    rtol, atol = tl.load(tolerance_ptr).to(high), tl.load(tolerance_ptr + 1).to(high)
    scale = atol + rtol * tl.abs(x)
    if PROBE:
        slope = tl.load(slope_ptr + start + places, mask=mask, other=0.0)
        tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(velocity - slope, scale, mask))
    else:
        tl.store(slope_ptr + start + places, velocity, mask=mask)
        tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(x, scale, mask))
        partial_ptr += tl.num_programs(0)
        tl.store(partial_ptr + tl.program_id(0), _sum_of_squares(velocity, scale, mask))


@triton.jit
def _finish_kernel(partial_ptr, out_ptr, images, blocks, values, BATCH_WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """``out[r, b] = sqrt(mean)`` from the sums ``partial[r, b, :]``, or from ``partial[r, :, :]`` in every entry.

    In the batch-wide case every program adds up the whole batch: they are few, and so they need not wait for another.
    """
    count = blocks * images if BATCH_WIDE else blocks
    if BATCH_WIDE:
        values *= images
        partial_ptr += (tl.program_id(0) // images).to(tl.int64) * count
    else:
        partial_ptr += tl.program_id(0).to(tl.int64) * count
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, count, BLOCK):
        places = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + places, mask=places < count, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sqrt(tl.sum(total) / values.to(tl.float64)))


# --- launches ----------------------------------------------------------------------------------------------


def _launch_arguments(
    kernel: str, x: Tensor, images: int, config: Mapping[str, int] | None
) -> tuple[tuple[int], dict[str, int]]:
    """The grid; and the values of an image, the blocks that they take, and the configuration.

    The shape class depends on the image alone: the size of its blocks decides the bits of its norm.
    """
    values = x.numel() // images
    if config is None:
        shape_class = "small" if values <= SMALL_IMAGE else "large"
        config = launch_config(f"ode_step.{kernel}", shape_class, arch_of(x.device))
    blocks = triton.cdiv(values, config["BLOCK"])
    return (images * blocks,), {"stride_image": values, "blocks": blocks, **config}


def _velocity_arguments(velocity: Tensor | None, guidance: Tensor | None, device: torch.device) -> dict[str, object]:
    """What :func:`_velocity` takes: a contiguous velocity, or rows ``[R, W]`` of dense channels; None for none."""
    guided = guidance is not None
    arguments: dict[str, object] = {
        "velocity_ptr": velocity,
        "guidance_ptr": guidance,
        "stride_half": 0,
        "stride_velocity_row": 0,
        "WIDTH": 0,
        "APART": (arch_of(device) or 0) >= 100,
        "GUIDED": guided,
        "GUIDANCE_PER_IMAGE": guidance is not None and guidance.shape[0] > 1,
    }
    if velocity is None:
        return arguments
    if velocity.is_contiguous():
        return arguments | {"stride_half": velocity.numel() // 2 if guided else 0}
    rows, row = velocity.shape[0], velocity.stride(0)
    return arguments | {
        "stride_half": rows // 2 * row if guided else 0,
        "stride_velocity_row": row,
        "WIDTH": velocity.shape[1],
    }


def _first(weights: Sequence[float]) -> int:
    return next(i for i, w in enumerate(weights) if w != 0.0)


def launch_euler(
    x: Tensor,
    velocity: Tensor,
    step: Tensor,
    guidance: Tensor | None,
    out: Tensor,
    images: int,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out``, which may be ``x``; ``step`` and ``guidance`` have one entry or ``images``."""
    if x.numel() == 0:
        return
    grid, arguments = _launch_arguments("euler", x, images, config)
    with torch.cuda.device_of(x):
        _euler_kernel[grid](
            x_ptr=x,
            step_ptr=step,
            out_ptr=out,
            STEP_PER_IMAGE=step.shape[0] > 1,
            enable_fp_fusion=False,  # level A
            **arguments,
            **_velocity_arguments(velocity, guidance, x.device),
        )


def launch_stage(
    x: Tensor,
    slopes: Tensor,
    step: Tensor,
    weights: Sequence[float],
    velocity: Tensor | None,
    guidance: Tensor | None,
    out: Tensor,
    images: int,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out`` from the first slopes; of these the last is filled from ``velocity`` where that is given."""
    if x.numel() == 0:
        return
    grid, arguments = _launch_arguments("stage", x, images, config)
    with torch.cuda.device_of(x):
        _stage_kernel[grid](
            x_ptr=x,
            slopes_ptr=slopes,
            step_ptr=step,
            out_ptr=out,
            stride_slope=slopes.stride(0),
            WEIGHTS=tuple(weights),
            COUNT=len(weights),
            FIRST=_first(weights),
            FRESH=velocity is not None,
            STEP_PER_IMAGE=step.shape[0] > 1,
            enable_fp_fusion=False,  # level A
            **arguments,
            **_velocity_arguments(velocity, guidance, x.device),
        )


def launch_accept(
    x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor, config: Mapping[str, int] | None = None
) -> None:
    """Update ``x`` and the first of the slopes where ``accept [B]`` (bool) says so."""
    if x.numel() == 0:
        return
    grid, arguments = _launch_arguments("accept", x, accept.shape[0], config)
    with torch.cuda.device_of(x):
        _accept_kernel[grid](
            x_ptr=x,
            slopes_ptr=slopes,
            solution_ptr=solution,
            accept_ptr=accept.view(torch.int8),
            stride_slope=slopes.stride(0),
            LAST=slopes.shape[0] - 1,
            enable_fp_fusion=False,
            **arguments,
        )


def launch_error(
    x: Tensor,
    slopes: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    velocity: Tensor | None,
    guidance: Tensor | None,
    out: Tensor,
    batch_wide: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out [B]`` with the error's norm, and the last slope from ``velocity`` where that is given."""
    images = step.shape[0]
    if images == 0:
        return
    grid, arguments = _launch_arguments("error", x, images, config)
    partial = out.new_empty(1, images, arguments["blocks"])
    padded = (*solution, *[0.0] * len(error))[: len(error)]  # the last slope, taken at the solution, has no part in it
    with torch.cuda.device_of(x):
        _error_kernel[grid](
            x_ptr=x,
            slopes_ptr=slopes,
            step_ptr=step,
            tolerance_ptr=tolerance,
            partial_ptr=partial,
            stride_slope=slopes.stride(0),
            SOLUTION=padded,
            ERROR=tuple(error),
            COUNT=len(error),
            FIRST_OF_SOLUTION=_first(padded),
            FIRST_OF_ERROR=_first(error),
            FRESH=velocity is not None,
            enable_fp_fusion=False,  # the slope that it stores is level A
            **arguments,
            **_velocity_arguments(velocity, guidance, x.device),
        )
    launch_finish(partial, arguments["stride_image"], out[None], batch_wide)


def launch_start(
    x: Tensor,
    slope: Tensor,
    velocity: Tensor,
    guidance: Tensor | None,
    tolerance: Tensor,
    out: Tensor,
    probe: bool,
    batch_wide: bool,
    config: Mapping[str, int] | None = None,
) -> None:
    """Fill ``out``: ``[1, B]`` for a probe, else ``[2, B]``, and ``slope``."""
    rows, images = out.shape
    if images == 0:
        return
    grid, arguments = _launch_arguments("start", x, images, config)
    partial = out.new_empty(rows, images, arguments["blocks"])
    with torch.cuda.device_of(x):
        _start_kernel[grid](
            x_ptr=x,
            slope_ptr=slope,
            tolerance_ptr=tolerance,
            partial_ptr=partial,
            PROBE=probe,
            enable_fp_fusion=False,  # the slope that it stores is level A
            **arguments,
            **_velocity_arguments(velocity, guidance, x.device),
        )
    launch_finish(partial, arguments["stride_image"], out, batch_wide)


def launch_finish(
    partial: Tensor, values: int, out: Tensor, batch_wide: bool, config: Mapping[str, int] | None = None
) -> None:
    """Fill ``out [R, B]`` from the blocks' sums ``partial [R, B, P]``; an image has ``values`` values."""
    rows, images, blocks = partial.shape
    config = launch_config("ode_step.finish", "any", arch_of(out.device)) if config is None else config
    with torch.cuda.device_of(out):
        _finish_kernel[(rows * images,)](
            partial_ptr=partial,
            out_ptr=out,
            images=images,
            blocks=blocks,
            values=values,
            BATCH_WIDE=batch_wide,
            enable_fp_fusion=False,
            **config,
        )

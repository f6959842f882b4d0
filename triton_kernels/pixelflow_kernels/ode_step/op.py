"""Updates of the state by the velocity: validation and registration of the implementations.

Each call is one custom operation with a CPU implementation (``reference``) and a CUDA one (``kernels``, imported on
first use because Triton is not installed everywhere). None has a backward, because they serve sampling only.

Conventions: a state ``x`` is a contiguous tensor of ``B`` images of equal size, image after image. The order of values
within an image is arbitrary, as long as state, slopes and velocity agree: ``[B, c, h, w]``, or tokens ``[B * N, W]`` as
returned by the model's head. ``B`` is the larger length of ``step`` and ``guidance``; if both have one entry, they
apply to all values, whatever images these belong to. For images of different sizes in one pack, treat each token as an
image and repeat its image's numbers: ``step[layout.image_index]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.registration import launched_by

from . import checks, reference

# --- public functions --------------------------------------------------------------------------------------


def euler_step(x: Tensor, velocity: Tensor, step: Tensor | float, guidance: Tensor | float | None = None) -> Tensor:
    """Compute ``x + step (v_null + w (v_cond - v_null))`` in one pass, reading each half of the velocity once.

    The velocity is first converted to the dtype of ``x``, as the engine does for a float32 state. (The published code
    combines bfloat16 halves in bfloat16 and keeps a bfloat16 state, which is less accurate.) The result has the bits of
    eager PyTorch (level A): ``n, c = velocity.to(x.dtype).chunk(2); x + step * (n + w * (c - n))``, where every
    operation rounds separately and ``step`` and ``w`` are rounded to the dtype of ``x``.

    Args:
        x: ``B`` images in float32 or float64, contiguous, of any shape.
        velocity: as many values in bf16, fp16, fp32, or fp64 for a float64 state; with guidance twice as many, the null
            half first. Contiguous, or rows ``[R, W]`` of dense channels with a row stride of at least ``W``.
        step: ``[B]`` or ``[1]`` float32 or float64, or a number. A number, also for ``guidance``, takes an additional
            launch that writes it to the device, so loops should pass a tensor.
        guidance: ``w`` as ``[B]`` or ``[1]`` float32 or float64, or a number; None if the velocity has no null half.

    Returns:
        The new state, like ``x``.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above, or a tensor requires grad
            while gradients are enabled; the message names it.

    Source: arXiv 2504.07963, section 3.4.
    """
    step, weight, images = _check_euler(x, velocity, step, guidance)
    return _euler_step(x, velocity, step, weight, images)


def euler_step_(x: Tensor, velocity: Tensor, step: Tensor | float, guidance: Tensor | float | None = None) -> None:
    """In-place version of :func:`euler_step`: updates ``x``."""
    step, weight, images = _check_euler(x, velocity, step, guidance)
    _euler_step_in_place(x, velocity, step, weight, images)


def stage_state_(
    out: Tensor,
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    weights: Sequence[float],
    velocity: Tensor | None = None,
    guidance: Tensor | float | None = None,
) -> None:
    """Compute ``out = x + sum_i (step w_i) k_i``, the state at which a Runge-Kutta method evaluates its next slope.

    If a velocity is given, it is the last of the ``len(weights)`` slopes: its halves are combined as in
    :func:`euler_step` and stored in ``slopes`` in the same pass. Otherwise all slopes are read from ``slopes``. Level
    A: ``step w_i`` is a float64 product rounded to the dtype of ``x``, terms are added from left to right, skipping
    zero weights, and the sum is added to ``x``.

    Args:
        out: like ``x``; filled.
        slopes: ``[S, *x.shape]`` in the dtype of ``x``, contiguous.
        x: the state before the step: ``B`` images in float32 or float64, contiguous, of any shape.
        step: ``[B]`` or ``[1]`` float64.
        weights: a row of the tableau: 1 to ``S`` numbers, not all 0.
        velocity, guidance: as in :func:`euler_step`.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above, or a tensor requires grad
            while gradients are enabled; the message names it.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.1.
    """
    checks.check_state(x)
    checks.check_like("out", out, x)
    checks.check_numbers("step", step, (torch.float64,), x.device)
    images = _images(x, step, guidance)
    checks.check_slopes(slopes, x, 1)
    weights = checks.check_weights("weights", weights, slopes.shape[0])
    weight = checks.check_guidance(guidance, images, x.device)
    if velocity is not None:
        checks.check_velocity(velocity, x, images, weight)
    _stage_state(out, slopes, x, step, weights, velocity, None if velocity is None else weight, images)


def _images(x: Tensor, step: Tensor, guidance: Tensor | float | None) -> int:
    """Determine ``B``, the number of entries of the longer of ``step`` and ``guidance``."""
    images = step.shape[0]
    if images == 1 and x.numel() == 0:
        images = 0
    elif images == 1 and isinstance(guidance, Tensor) and guidance.ndim == 1:
        images = guidance.shape[0]
    checks.check_images(x, images, "step")
    return images


def _check_euler(
    x: Tensor, velocity: Tensor, step: Tensor | float, guidance: Tensor | float | None
) -> tuple[Tensor, Tensor | None, int]:
    checks.check_state(x)
    if isinstance(step, Tensor):
        checks.check_numbers("step", step, checks.STATE_TYPES, x.device)
    else:
        step = torch.full((1,), step, dtype=torch.float64, device=x.device)
    images = _images(x, step, guidance)
    weight = checks.check_guidance(guidance, images, x.device)
    checks.check_velocity(velocity, x, images, weight)
    return step, weight, images


# --- Euler -------------------------------------------------------------------------------------------------


@custom_op("pixelflow::euler_step", mutates_args=(), device_types="cpu")
def _euler_step(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> Tensor:
    return reference.euler(x, velocity, step, guidance, images) if images > 0 else torch.empty_like(x)


@launched_by(_euler_step)
def _launch_euler_step(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> Tensor:
    from . import kernels

    out = torch.empty_like(x)
    kernels.launch_euler(x, velocity, step, guidance, out, images)
    return out


@_euler_step.register_fake
def _fake_euler_step(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> Tensor:
    return torch.empty_like(x)


@custom_op("pixelflow::euler_step_in_place", mutates_args=("x",), device_types="cpu")
def _euler_step_in_place(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> None:
    if images > 0:
        x.copy_(reference.euler(x, velocity, step, guidance, images))


@launched_by(_euler_step_in_place)
def _launch_euler_step_in_place(
    x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int
) -> None:
    from . import kernels

    kernels.launch_euler(x, velocity, step, guidance, x, images)


@_euler_step_in_place.register_fake
def _fake_euler_step_in_place(x: Tensor, velocity: Tensor, step: Tensor, guidance: Tensor | None, images: int) -> None:
    return None


# --- Runge-Kutta stages ------------------------------------------------------------------------------------


@custom_op("pixelflow::stage_state", mutates_args=("out", "slopes"), device_types="cpu")
def _stage_state(
    out: Tensor,
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    weights: Sequence[float],
    velocity: Tensor | None,
    guidance: Tensor | None,
    images: int,
) -> None:
    store_slope(slopes[len(weights) - 1], velocity, guidance, images)
    if x.numel() > 0:
        out.copy_(reference.stage_state(x, slopes, step.expand(images), weights))


def store_slope(slope: Tensor, velocity: Tensor | None, guidance: Tensor | None, images: int) -> None:
    """Fill ``slope`` with the guided velocity if one is given; used by the CPU implementations."""
    if velocity is not None and slope.numel() > 0:
        slope.copy_(reference.guided(velocity, guidance, images, slope.dtype).view(slope.shape))


@launched_by(_stage_state)
def _launch_stage_state(
    out: Tensor,
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    weights: Sequence[float],
    velocity: Tensor | None,
    guidance: Tensor | None,
    images: int,
) -> None:
    from . import kernels

    kernels.launch_stage(x, slopes, step, weights, velocity, guidance, out, images)


@_stage_state.register_fake
def _fake_stage_state(
    out: Tensor,
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    weights: Sequence[float],
    velocity: Tensor | None,
    guidance: Tensor | None,
    images: int,
) -> None:
    return None

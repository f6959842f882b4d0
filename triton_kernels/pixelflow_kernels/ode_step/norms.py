"""Norms of an adaptive Runge-Kutta step: the error norm, and the norms that determine the first step size.

As in ``op``, images lie one after another in contiguous tensors, nothing is differentiable, and each call is one custom
operation with a CPU implementation (``reference``) and kernels (``norm_kernels``). None synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.registration import launched_by

from . import checks, reference
from .op import store_slope

# --- public functions --------------------------------------------------------------------------------------


def error_norm_(
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    velocity: Tensor | None = None,
    guidance: Tensor | float | None = None,
    *,
    batch_wide: bool = False,
) -> Tensor:
    """Compute each image's error norm ``rms(error / (atol + rtol max(|x|, |x1|)))`` from the slopes in one pass.

    ``x1 = x + sum_i (step a_i) k_i`` and ``error = sum_i (step e_i) k_i`` have the bits of eager PyTorch (level A);
    the norm is level D. The order of summation depends only on the number of values per image and on the velocity's
    dtype and strides, so an image's norm has the same bits in any batch (level C), unless it is batch-wide. Image and
    token layouts give the norm of the same values, but summed in a different order.

    Args:
        slopes: ``[S, *x.shape]`` in the dtype of ``x``, contiguous. If a velocity is given, the last is filled from it.
        x: the state before the step: ``B`` images in float32 or float64, contiguous, of any shape.
        step: ``[B]`` float64.
        solution: weights ``a`` of the solution, the tableau's last row; the last slope's weight, 0, may be omitted.
        error: weights ``e``, ``[S]``, of the difference to the embedded solution of lower order.
        tolerance: ``(rtol, atol)``, ``[2]`` float64.
        velocity, guidance: the newest slope, as in ``euler_step``.
        batch_wide: whether every image gets the norm of the whole batch.

    Returns:
        ``[B]`` float64.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above, or a tensor requires grad
            while gradients are enabled; the message names it.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, equation II.4.11.
    """
    checks.check_state(x)
    checks.check_numbers("step", step, (torch.float64,), x.device)
    images = step.shape[0]
    checks.check_images(x, images, "step")
    checks.check_slopes(slopes, x, 1)
    count = slopes.shape[0]
    error = checks.check_weights("error", error, count)
    if len(error) != count:
        raise ValueError(f"error: got {len(error)} weights, expected one for each of {count} slopes")
    solution = checks.check_weights("solution", solution, count)
    checks.check_tolerance(tolerance, x.device)
    weight = checks.check_guidance(guidance, images, x.device)
    if velocity is not None:
        checks.check_velocity(velocity, x, images, weight)
    weight = None if velocity is None else weight
    return _error_norm(slopes, x, step, solution, error, tolerance, velocity, weight, batch_wide)


def first_slope_(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    images: int,
    guidance: Tensor | float | None = None,
    *,
    batch_wide: bool = False,
) -> Tensor:
    """Store the guided first slope, and measure state and slope relative to ``atol + rtol |x|``.

    Args:
        slope: like ``x``; filled.
        x: ``B`` images in float32 or float64, contiguous, of any shape.
        velocity, guidance: as in ``euler_step``.
        tolerance: ``(rtol, atol)``, ``[2]`` float64.
        images: ``B``.
        batch_wide: whether every image gets the norms of the whole batch.

    Returns:
        ``[2, B]`` float64: relative root mean squares of ``x`` and of the slope.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above, or a tensor requires grad
            while gradients are enabled; the message names it.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4, "starting step size".
    """
    weight = _check_start(slope, x, velocity, tolerance, images, guidance)
    return _first_slope(slope, x, velocity, tolerance, weight, images, batch_wide)


def slope_change(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    images: int,
    guidance: Tensor | float | None = None,
    *,
    batch_wide: bool = False,
) -> Tensor:
    """Measure the guided velocity's distance from ``slope`` relative to ``atol + rtol |x|``: ``[B]`` float64.

    Arguments and errors as in :func:`first_slope_`, except that ``slope`` is read.
    """
    weight = _check_start(slope, x, velocity, tolerance, images, guidance)
    return _slope_change(slope, x, velocity, tolerance, weight, images, batch_wide)


def _check_start(
    slope: Tensor, x: Tensor, velocity: Tensor, tolerance: Tensor, images: int, guidance: Tensor | float | None
) -> Tensor | None:
    checks.check_state(x)
    checks.check_like("slope", slope, x)
    checks.check_images(x, images, "images")
    checks.check_tolerance(tolerance, x.device)
    weight = checks.check_guidance(guidance, images, x.device)
    checks.check_velocity(velocity, x, images, weight)
    return weight


# --- error -------------------------------------------------------------------------------------------------


@custom_op("pixelflow::error_norm", mutates_args=("slopes",), device_types="cpu")
def _error_norm(
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    velocity: Tensor | None,
    guidance: Tensor | None,
    batch_wide: bool,
) -> Tensor:
    if x.numel() == 0:
        return step.new_empty(0)
    store_slope(slopes[-1], velocity, guidance, step.shape[0])
    return reference.error_norm(x, slopes, step, solution, error, tolerance, batch_wide)


@launched_by(_error_norm)
def _launch_error_norm(
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    velocity: Tensor | None,
    guidance: Tensor | None,
    batch_wide: bool,
) -> Tensor:
    from . import norm_kernels

    out = torch.empty_like(step)
    norm_kernels.launch_error(x, slopes, step, solution, error, tolerance, velocity, guidance, out, batch_wide)
    return out


@_error_norm.register_fake
def _fake_error_norm(
    slopes: Tensor,
    x: Tensor,
    step: Tensor,
    solution: Sequence[float],
    error: Sequence[float],
    tolerance: Tensor,
    velocity: Tensor | None,
    guidance: Tensor | None,
    batch_wide: bool,
) -> Tensor:
    return torch.empty_like(step)


# --- first step --------------------------------------------------------------------------------------------


@custom_op("pixelflow::first_slope", mutates_args=("slope",), device_types="cpu")
def _first_slope(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    if images == 0:
        return tolerance.new_empty(2, 0)
    store_slope(slope, velocity, guidance, images)
    return reference.start_norms(x, slope, None, tolerance, images, batch_wide)


@launched_by(_first_slope)
def _launch_first_slope(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    from . import norm_kernels

    out = tolerance.new_empty(2, images)
    norm_kernels.launch_start(x, slope, velocity, guidance, tolerance, out, False, batch_wide)
    return out


@_first_slope.register_fake
def _fake_first_slope(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    return tolerance.new_empty(2, images)


@custom_op("pixelflow::slope_change", mutates_args=(), device_types="cpu")
def _slope_change(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    if images == 0:
        return tolerance.new_empty(0)
    probe = reference.guided(velocity, guidance, images, x.dtype)
    return reference.start_norms(x, slope, probe, tolerance, images, batch_wide)[0]


@launched_by(_slope_change)
def _launch_slope_change(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    from . import norm_kernels

    out = tolerance.new_empty(images)
    norm_kernels.launch_start(x, slope, velocity, guidance, tolerance, out[None], True, batch_wide)
    return out


@_slope_change.register_fake
def _fake_slope_change(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    return tolerance.new_empty(images)

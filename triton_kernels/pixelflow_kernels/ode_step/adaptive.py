"""Operations of an adaptive Runge-Kutta step: norms, controller, acceptance. None waits for the device.

As in ``op``: images lie one after another in contiguous tensors, nothing is differentiable, and each call is one custom
operation with a plain implementation and kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

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
    """Solution, embedded error and its norm in one pass: ``rms(error / (atol + rtol max(|x|, |x1|)))`` of each image.

    ``x1 = x + sum_i (step a_i) k_i`` and ``error = sum_i (step e_i) k_i`` have the bits of eager PyTorch (level A),
    their norm is level D. Its sums run in an order that depends on the number of values per image and on the velocity's
    type and strides alone, so an image's norm has the same bits whatever its batch mates (level C; not so batch-wide).
    In image and in token layout it is the norm of the same set of values, but summed in another order.

    Args:
        slopes: ``[S, *x.shape]`` in the type of ``x``, contiguous. With a velocity, the last is filled from it.
        x: the state before the step: ``B`` images in float32 or float64, contiguous, of any shape.
        step: ``[B]`` float64.
        solution: weights of the solution: the tableau's last row; the last slope's, which is 0, may be left out.
        error: weights ``[S]`` of the difference to the companion of lower order.
        tolerance: ``(rtol, atol)``, ``[2]`` float64.
        velocity, guidance: the newest slope, as in ``euler_step``.
        batch_wide: the norm of the whole batch, for every image.

    Returns:
        ``[B]`` float64.

    Raises:
        ValueError: a shape, type, device or stride is not as said, or a gradient is asked for; the message names it.

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
        slope: like ``x``.
        x: ``B`` images in float32 or float64, contiguous, of any shape.
        velocity, guidance: as in ``euler_step``.
        tolerance: ``(rtol, atol)``, ``[2]`` float64.
        images: ``B``.
        batch_wide: norms of the whole batch, for every image.

    Returns:
        ``[2, B]`` float64: root mean squares of ``x`` and of the slope.

    Raises:
        ValueError: a shape, type, device or stride is not as said, or a gradient is asked for; the message names it.

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
    """How far the guided velocity is from ``slope``, relative to ``atol + rtol |x|``: ``[B]`` float64.

    Arguments and errors as in :func:`first_slope_`; ``slope`` is read.
    """
    weight = _check_start(slope, x, velocity, tolerance, images, guidance)
    return _slope_change(slope, x, velocity, tolerance, weight, images, batch_wide)


def begin_attempt_(h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]) -> None:
    """The step that each image will try, cut to end at 1, and the times at which its slopes are taken. Level A.

    An image that has arrived or failed gets ``h = 0`` and stands still in the batch.

    Args:
        h: ``[B]`` float64, filled.
        times: ``[S, B]`` float64, filled; where ``h`` reaches the end, the times of nodes 1 are exactly 1.
        tau: where each image is, ``[B]`` float64.
        step: the step proposed, ``[B]`` float64.
        status: ``[B]`` int32; only those RUNNING are moved.
        nodes: of the tableau, ``S``, the last one 1.

    Raises:
        ValueError: a shape, type or device is not as said; the message names it.
    """
    images, device = tau.shape[0], tau.device
    for name, y in (("tau", tau), ("h", h), ("step", step)):
        checks.check_per_image(name, y, torch.float64, images, device)
    checks.check_per_image("status", status, torch.int32, images, device)
    _check_times(times, images, device, nodes)
    _begin_attempt(h, times, tau, step, status, [float(c) for c in nodes])


def end_attempt_(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    accepted: Tensor,
    rejected: Tensor,
    accept: Tensor,
    h: Tensor,
    times: Tensor,
    ratio: Tensor,
    *,
    order: int,
    max_attempts: int,
) -> None:
    """Accept or reject the attempt of each image that is under way, count it, and choose the next step.

    Accepted where ``ratio <= 1``. The next step is ``h clamp(0.9 ratio^(-1/order), 0.2, 10)``, never less than ``h``
    where ``ratio < 1``. An image stops with the status ARRIVED (``tau = 1``), MAX_ATTEMPTS, UNDERFLOW (``tau + h`` is
    ``tau``) or NONFINITE (so is the ratio); the attempts that found the latter two are not counted.

    Args:
        tau, step: ``[B]`` float64, updated.
        status: ``[B]`` int32, updated.
        accepted, rejected: ``[B]`` int64, updated.
        accept: ``[B]`` bool, filled: this attempt was accepted.
        h, times: as filled by :func:`begin_attempt_`.
        ratio: the error's norm, ``[B]`` float64.
        order: of the solution.
        max_attempts: accepted and rejected ones together.

    Raises:
        ValueError: a shape, type or device is not as said; the message names it.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, equation II.4.13.
    """
    images, device = tau.shape[0], tau.device
    for name, y in (("tau", tau), ("step", step), ("h", h), ("ratio", ratio)):
        checks.check_per_image(name, y, torch.float64, images, device)
    for name, y in (("accepted", accepted), ("rejected", rejected)):
        checks.check_per_image(name, y, torch.int64, images, device)
    checks.check_per_image("status", status, torch.int32, images, device)
    checks.check_per_image("accept", accept, torch.bool, images, device)
    _check_times(times, images, device, None)
    if order < 1:
        raise ValueError(f"order: got {order}, expected 1 or more")
    if max_attempts < 1:
        raise ValueError(f"max_attempts: got {max_attempts}, expected 1 or more")
    _end_attempt(tau, step, status, accepted, rejected, accept, h, times, ratio, order, max_attempts)


def take_accepted_(x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor) -> None:
    """Where ``accept``, the solution becomes the state, and the last slope the first (FSAL); bits are copied.

    Args:
        x: ``B`` images in float32 or float64, contiguous, of any shape; updated.
        slopes: ``[S, *x.shape]``, contiguous; the first is updated.
        solution: like ``x``.
        accept: ``[B]`` bool.

    Raises:
        ValueError: a shape, type, device or stride is not as said; the message names it.
    """
    checks.check_state(x)
    checks.check_slopes(slopes, x, 1)
    checks.check_like("solution", solution, x)
    checks.check_numbers("accept", accept, (torch.bool,), x.device)
    checks.check_images(x, accept.shape[0], "accept")
    _take_accepted(x, slopes, solution, accept)


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


def _check_times(times: Tensor, images: int, device: torch.device, nodes: Sequence[float] | None) -> None:
    if nodes is not None and (len(nodes) < 2 or nodes[-1] != 1):
        raise ValueError(f"nodes: got {tuple(nodes)}, expected two or more that end with 1")
    stages = times.shape[0] if nodes is None else len(nodes)
    if times.ndim != 2 or tuple(times.shape) != (stages, images) or stages == 0:
        raise ValueError(f"times: got shape {tuple(times.shape)}, expected one row of {images} per slope")
    if times.dtype != torch.float64:
        raise ValueError(f"times: got {times.dtype}, expected torch.float64")
    checks.check_device("times", times, device)
    checks.check_contiguous("times", times)


# --- norms -------------------------------------------------------------------------------------------------


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


@_error_norm.register_kernel("cuda")
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
    from . import kernels

    out = torch.empty_like(step)
    kernels.launch_error(x, slopes, step, solution, error, tolerance, velocity, guidance, out, batch_wide)
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


@_first_slope.register_kernel("cuda")
def _launch_first_slope(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    from . import kernels

    out = tolerance.new_empty(2, images)
    kernels.launch_start(x, slope, velocity, guidance, tolerance, out, False, batch_wide)
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


@_slope_change.register_kernel("cuda")
def _launch_slope_change(
    slope: Tensor,
    x: Tensor,
    velocity: Tensor,
    tolerance: Tensor,
    guidance: Tensor | None,
    images: int,
    batch_wide: bool,
) -> Tensor:
    from . import kernels

    out = tolerance.new_empty(images)
    kernels.launch_start(x, slope, velocity, guidance, tolerance, out[None], True, batch_wide)
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


# --- controller --------------------------------------------------------------------------------------------


@custom_op("pixelflow::begin_attempt", mutates_args=("h", "times"), device_types="cpu")
def _begin_attempt(h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]) -> None:
    for out, y in zip((h, times), reference.begin_attempt(tau, step, status, nodes), strict=True):
        out.copy_(y)


@_begin_attempt.register_kernel("cuda")
def _launch_begin_attempt(
    h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]
) -> None:
    from . import control

    control.launch_begin(tau, step, status, nodes, h, times)


@_begin_attempt.register_fake
def _fake_begin_attempt(
    h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]
) -> None:
    return None


_CONTROLLED = ("tau", "step", "status", "accepted", "rejected", "accept")


@custom_op("pixelflow::end_attempt", mutates_args=_CONTROLLED, device_types="cpu")
def _end_attempt(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    accepted: Tensor,
    rejected: Tensor,
    accept: Tensor,
    h: Tensor,
    times: Tensor,
    ratio: Tensor,
    order: int,
    max_attempts: int,
) -> None:
    now = (tau, step, status, accepted, rejected)
    for out, y in zip(
        (*now, accept), reference.end_attempt(*now, h, times[-1], ratio, order, max_attempts), strict=True
    ):
        out.copy_(y)


@_end_attempt.register_kernel("cuda")
def _launch_end_attempt(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    accepted: Tensor,
    rejected: Tensor,
    accept: Tensor,
    h: Tensor,
    times: Tensor,
    ratio: Tensor,
    order: int,
    max_attempts: int,
) -> None:
    from . import control

    factors = (reference.SAFETY, reference.SMALLEST_FACTOR, reference.LARGEST_FACTOR)
    now = (tau, step, status, accepted, rejected, accept)
    control.launch_end(*now, h, times[-1], ratio, order, max_attempts, factors)


@_end_attempt.register_fake
def _fake_end_attempt(
    tau: Tensor,
    step: Tensor,
    status: Tensor,
    accepted: Tensor,
    rejected: Tensor,
    accept: Tensor,
    h: Tensor,
    times: Tensor,
    ratio: Tensor,
    order: int,
    max_attempts: int,
) -> None:
    return None


@custom_op("pixelflow::take_accepted", mutates_args=("x", "slopes"), device_types="cpu")
def _take_accepted(x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor) -> None:
    if x.numel() == 0:
        return
    for old, new in ((x, solution), (slopes[0], slopes[-1])):
        rows = old.view(accept.shape[0], -1)
        rows.copy_(torch.where(accept[:, None], new.view(rows.shape), rows))


@_take_accepted.register_kernel("cuda")
def _launch_take_accepted(x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor) -> None:
    from . import kernels

    kernels.launch_accept(x, slopes, solution, accept)


@_take_accepted.register_fake
def _fake_take_accepted(x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor) -> None:
    return None

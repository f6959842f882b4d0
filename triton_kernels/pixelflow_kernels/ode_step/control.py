"""Control of an adaptive Runge-Kutta attempt: step size and times, acceptance or rejection, update of the state.

Each call is one custom operation with a CPU implementation (``reference``) and a kernel (``control_kernels``, or
``kernels`` for the update of whole states). None synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from pixelflow_kernels.registration import launched_by

from . import checks, reference

# --- public functions --------------------------------------------------------------------------------------


def begin_attempt_(h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]) -> None:
    """Compute the step that each image tries, clipped to end at 1, and the times of its slopes. Level A.

    An image that has arrived or failed gets ``h = 0`` and stays unchanged in the batch.

    Args:
        h: ``[B]`` float64, filled.
        times: ``[S, B]`` float64, filled; if the step reaches the end, the times of nodes equal to 1 are exactly 1.
        tau: current time of each image, ``[B]`` float64.
        step: proposed step, ``[B]`` float64.
        status: ``[B]`` int32; only images that are RUNNING move.
        nodes: the ``S`` nodes of the tableau, two or more; the last is 1.

    Raises:
        ValueError: a shape, dtype, device or number does not meet the requirements above; the message names it.
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
    """Accept or reject the attempt of each running image, count it, and choose the next step size.

    An attempt is accepted if ``ratio <= 1``. The next step is ``h clamp(0.9 ratio^(-1/order), 0.2, 10)``, and at least
    ``h`` if ``ratio < 1``. An image stops with the status ARRIVED (``tau = 1``), MAX_ATTEMPTS, UNDERFLOW (``tau + h``
    equals ``tau``) or NONFINITE (the ratio is not finite); attempts that end in one of the latter two are not counted.

    Args:
        tau, step: ``[B]`` float64, updated.
        status: ``[B]`` int32, updated.
        accepted, rejected: ``[B]`` int64, updated.
        accept: ``[B]`` bool, filled: whether this attempt was accepted.
        h, times: as filled by :func:`begin_attempt_`.
        ratio: the error norm, ``[B]`` float64.
        order: order of the solution.
        max_attempts: maximum number of attempts, accepted and rejected ones together.

    Raises:
        ValueError: a shape, dtype, device or number does not meet the requirements above; the message names it.

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
    """For accepted images, copy the solution to the state, and the last slope to the first (FSAL), bit for bit.

    Args:
        x: ``B`` images in float32 or float64, contiguous, of any shape; updated.
        slopes: ``[S, *x.shape]``, contiguous; the first is updated.
        solution: like ``x``.
        accept: ``[B]`` bool.

    Raises:
        ValueError: a shape, dtype, device or stride does not meet the requirements above, or a tensor requires grad
            while gradients are enabled; the message names it.
    """
    checks.check_state(x)
    checks.check_slopes(slopes, x, 1)
    checks.check_like("solution", solution, x)
    checks.check_numbers("accept", accept, (torch.bool,), x.device)
    checks.check_images(x, accept.shape[0], "accept")
    _take_accepted(x, slopes, solution, accept)


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


# --- operations --------------------------------------------------------------------------------------------


@custom_op("pixelflow::begin_attempt", mutates_args=("h", "times"), device_types="cpu")
def _begin_attempt(h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]) -> None:
    for out, y in zip((h, times), reference.begin_attempt(tau, step, status, nodes), strict=True):
        out.copy_(y)


@launched_by(_begin_attempt)
def _launch_begin_attempt(
    h: Tensor, times: Tensor, tau: Tensor, step: Tensor, status: Tensor, nodes: Sequence[float]
) -> None:
    from . import control_kernels

    control_kernels.launch_begin(tau, step, status, nodes, h, times)


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


@launched_by(_end_attempt)
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
    from . import control_kernels

    factors = (reference.SAFETY, reference.SMALLEST_FACTOR, reference.LARGEST_FACTOR)
    now = (tau, step, status, accepted, rejected, accept)
    control_kernels.launch_end(*now, h, times[-1], ratio, order, max_attempts, factors)


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


@launched_by(_take_accepted)
def _launch_take_accepted(x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor) -> None:
    from . import kernels

    kernels.launch_accept(x, slopes, solution, accept)


@_take_accepted.register_fake
def _fake_take_accepted(x: Tensor, slopes: Tensor, solution: Tensor, accept: Tensor) -> None:
    return None

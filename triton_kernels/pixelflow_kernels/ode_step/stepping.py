"""One attempt of an adaptive integration as a fixed sequence of launches on tensors with fixed addresses.

Nothing here synchronises with the device or depends on its results on the host, so an attempt can be captured into a
CUDA graph and replayed. The caller reads ``status`` from time to time to see whether all images have stopped; it may do
so late, because stopped images no longer change. The velocity field is supplied by the caller. Source: arXiv
2504.07963, section 3.4; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .control import begin_attempt_, end_attempt_, take_accepted_
from .norms import error_norm_, first_slope_, slope_change
from .op import stage_state_

Field = Callable[[Tensor, Tensor], Tensor]
"""Velocity field ``(state like x, tau [B] float64) -> velocity``; with guidance both halves, the null half first."""


class EmbeddedPair(Protocol):
    """A Butcher tableau whose last slope is evaluated at the solution and is the first slope of the next step (FSAL).

    ``nodes``: times of the slopes as fractions of the step, from 0 to 1. ``coupling``: row i holds the weights of
    slopes 0..i-1 in the state at which slope i is evaluated; the last row is the solution. ``error``: weights of the
    slopes in the difference between the solution and the embedded one. ``order``: order of the solution.
    """

    @property
    def nodes(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def coupling(self) -> tuple[tuple[float, ...], ...]: ...  # noqa: D102
    @property
    def error(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def order(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Adaptive:
    """State of an adaptive integration of ``B`` images from tau = 0 to 1, entirely on the device.

    Attributes:
        x: the state, float32 or float64, contiguous, image after image, of any shape.
        stage: like ``x``: the state at which the next slope is evaluated; at the end of an attempt, the new solution.
        slopes: ``[S, *x.shape]``; the first is the velocity at ``x``.
        tau: current time of each image, ``[B]`` float64.
        step: step size to try next, ``[B]`` float64.
        h: step size of the current attempt, ``[B]`` float64.
        times: times of the slopes of the current attempt, ``[S, B]`` float64.
        status: ``[B]`` int32: RUNNING, ARRIVED, MAX_ATTEMPTS, UNDERFLOW or NONFINITE.
        accepted, rejected: number of attempts so far, ``[B]`` int64.
        accept: whether the last attempt was accepted, ``[B]`` bool.
        tolerance: ``(rtol, atol)``, ``[2]`` float64.
    """

    x: Tensor
    stage: Tensor
    slopes: Tensor
    tau: Tensor
    step: Tensor
    h: Tensor
    times: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    accept: Tensor
    tolerance: Tensor

    @classmethod
    def around(cls, x: Tensor, images: int, slopes: int, *, rtol: float = 1e-3, atol: float = 1e-6) -> Adaptive:
        """Allocate the tensors for an integration of ``x``, which is updated in place.

        Args:
            x: ``images`` images in float32 or float64, contiguous, of any shape.
            images: ``B``.
            slopes: ``S``, the number of nodes of the tableau.
            rtol, atol: a step is accepted if the root mean square of ``error / (atol + rtol max(|x0|, |x1|))`` is at
                most 1.

        Raises:
            ValueError: ``rtol`` or ``atol`` is negative or not finite, or both are 0.
        """
        if not (rtol >= 0 and atol >= 0 and 0 < rtol + atol < math.inf):
            raise ValueError(f"rtol, atol: got {rtol}, {atol}, expected finite numbers of 0 or more, not both 0")
        numbers = torch.zeros(3 + slopes, images, dtype=torch.float64, device=x.device)
        counts = torch.zeros(2, images, dtype=torch.int64, device=x.device)
        tolerance = torch.full((2,), atol, dtype=torch.float64, device=x.device)
        tolerance[:1].fill_(rtol)
        return cls(
            x=x,
            stage=torch.zeros_like(x),
            slopes=x.new_zeros(slopes, *x.shape),
            tau=numbers[0],
            step=numbers[1],
            h=numbers[2],
            times=numbers[3:],
            status=torch.full((images,), reference.RUNNING, dtype=torch.int32, device=x.device),
            accepted=counts[0],
            rejected=counts[1],
            accept=torch.zeros(images, dtype=torch.bool, device=x.device),
            tolerance=tolerance,
        )

    def tensors(self) -> Sequence[Tensor]:
        """Return all tensors, e.g. as the static inputs of a CUDA graph."""
        return [getattr(self, name) for name in self.__slots__]


def start_(
    state: Adaptive,
    pair: EmbeddedPair,
    field: Field,
    guidance: Tensor | float | None = None,
    *,
    batch_wide: bool = False,
) -> None:
    """Start from ``state.x`` at tau = 0: compute the first slope and the first step size, with two calls of the field.

    Args:
        state: ``x`` and ``tolerance`` are read; everything else that an attempt reads is initialised.
        pair: the tableau.
        field: the velocity field.
        guidance: ``w`` as ``[B]`` or ``[1]``, or a number, if the field returns both halves; None if it returns one.
        batch_wide: whether the whole batch shares one norm, and therefore one step size.

    Raises:
        ValueError: a result of the field, or a part of the state, is invalid; the message names it.

    Source: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4, "starting step size".
    """
    images = state.tau.shape[0]
    for counter in (state.tau, state.accepted, state.rejected, state.accept):
        counter.zero_()
    measure = (state.tolerance, images, guidance)
    norms = first_slope_(state.slopes[0], state.x, field(state.x, state.tau), *measure, batch_wide=batch_wide)
    trial = reference.first_trial(norms)
    stage_state_(state.stage, state.slopes, state.x, trial, (1.0,))
    bend = slope_change(state.slopes[0], state.x, field(state.stage, trial), *measure, batch_wide=batch_wide)
    step = reference.first_step(trial, norms[1], bend, pair.order)
    state.step.copy_(step)
    state.status.fill_(reference.RUNNING).masked_fill_(~step.isfinite(), reference.NONFINITE)


def attempt_(
    state: Adaptive,
    pair: EmbeddedPair,
    field: Field,
    guidance: Tensor | float | None = None,
    *,
    max_attempts: int = 1000,
    batch_wide: bool = False,
) -> None:
    """Try one step of every image that is RUNNING, with S - 1 calls of the field and the same launches every time.

    Args:
        state: as left by :func:`start_` or an earlier attempt; updated.
        pair, field, guidance, batch_wide: as in :func:`start_`.
        max_attempts: an image that needs more attempts gets the status MAX_ATTEMPTS.

    Raises:
        ValueError: a result of the field, or a part of the state, is invalid; the message names it.
    """
    x, slopes, h = state.x, state.slopes, state.h
    begin_attempt_(h, state.times, state.tau, state.step, state.status, pair.nodes)
    stage_state_(state.stage, slopes, x, h, pair.coupling[1])
    for time, row in zip(state.times[1:], pair.coupling[2:], strict=False):
        stage_state_(state.stage, slopes, x, h, row, field(state.stage, time), guidance)
    last = field(state.stage, state.times[-1])
    ratio = error_norm_(
        slopes, x, h, pair.coupling[-1], pair.error, state.tolerance, last, guidance, batch_wide=batch_wide
    )
    end_attempt_(
        state.tau,
        state.step,
        state.status,
        state.accepted,
        state.rejected,
        state.accept,
        h,
        state.times,
        ratio,
        order=pair.order,
        max_attempts=max_attempts,
    )
    take_accepted_(x, slopes, state.stage, state.accept)

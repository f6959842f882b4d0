"""One attempt of an adaptive integration as a fixed list of launches over tensors that stay where they are.

Nothing here waits for the device or depends on what it computes, so an attempt can be captured into a CUDA graph and
replayed; the caller asks ``status`` now and then whether all images have stopped, and may ask late: images that have
stopped stand still. The slopes' own field is the caller's. Source: arXiv 2504.07963, section 3.4; Hairer, Norsett and
Wanner, Solving Ordinary Differential Equations I, section II.4.
"""

from __future__ import annotations

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
"""``(state like x, tau [B] float64) -> velocity``; with guidance both halves, the null half first."""


class EmbeddedPair(Protocol):
    """A Butcher tableau whose last slope is taken at the solution and is the next step's first (FSAL).

    ``nodes``: times of the slopes as fractions of the step, from 0 to 1. ``coupling``: row i holds the weights of
    slopes 0..i-1 in the state at which slope i is taken; the last row is the solution. ``error``: weights of the slopes
    in the difference between the solution and its companion. ``order``: of the solution.
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
    """An adaptive integration from tau = 0 to 1 of ``B`` images, all of it on the device.

    Attributes:
        x: the state, float32 or float64, contiguous, image after image, of any shape.
        stage: like ``x``: where the next slope is taken; at the end of an attempt, the solution proposed.
        slopes: ``[S, *x.shape]``; the first is the velocity at ``x``.
        tau: where each image is, ``[B]`` float64.
        step: the step that it will try next, ``[B]`` float64.
        h: the step that it tries now, ``[B]`` float64.
        times: of the slopes of this attempt, ``[S, B]`` float64.
        status: ``[B]`` int32: RUNNING, ARRIVED, MAX_ATTEMPTS, UNDERFLOW or NONFINITE.
        accepted, rejected: attempts so far, ``[B]`` int64.
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
        """Memory for an integration of ``x``, which is worked on in place.

        Args:
            x: ``images`` images in float32 or float64, contiguous, of any shape.
            images: ``B``.
            slopes: ``S``, as many as the tableau has nodes.
            rtol, atol: a step is accepted when the root mean square of ``error / (atol + rtol max(|x0|, |x1|))`` is at
                most 1.

        Raises:
            ValueError: ``rtol`` or ``atol`` is negative, or both are 0.
        """
        if rtol < 0 or atol < 0 or rtol + atol == 0:
            raise ValueError(f"rtol, atol: got {rtol}, {atol}, expected no negative number and not both 0")
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
        """All of them, as for a graph's static inputs."""
        return [getattr(self, name) for name in self.__slots__]


def start_(
    state: Adaptive,
    pair: EmbeddedPair,
    field: Field,
    guidance: Tensor | float | None = None,
    *,
    batch_wide: bool = False,
) -> None:
    """Set out from ``state.x`` at tau = 0: first slope and first step size, two calls of the field.

    Args:
        state: everything but ``x`` and ``tolerance`` is set.
        pair: the tableau.
        field: gives the velocities.
        guidance: ``w`` as ``[B]`` or ``[1]``, or a number, where the field gives both halves; None where it gives one.
        batch_wide: one norm, and so one step size, for the whole batch.

    Raises:
        ValueError: what the field gives, or a part of the state, is not as it must be; the message names it.

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
    """Try one step of every image that is RUNNING; S - 1 calls of the field. The launches are the same every time.

    Args:
        state: as :func:`start_` or an earlier attempt left it; updated.
        pair, field, guidance, batch_wide: as in :func:`start_`.
        max_attempts: an image that needs more gets the status MAX_ATTEMPTS.

    Raises:
        ValueError: what the field gives, or a part of the state, is not as it must be; the message names it.
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

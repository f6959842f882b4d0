"""ode_step: an Euler step with guidance; the last stage of Dopri5 and its error norm, also with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pixelflow_kernels.ode_step import error_norm_, euler_step, reference, stage_state_
from pixelflow_kernels.ode_step.specimens import ERROR, STAGES

from .case import PATCH_CHANNELS, Case, Outputs, Problem, compiled, size_of

SOLUTION = STAGES[-1]
"""Dopri5's longest row: the state at the end of an attempt, from six slopes of which the newest is not stored yet."""
TOLERANCES = (1e-3, 1e-6)

NORM_GROWTH = 4 * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
"""Growth of the error norm: it is float64, but its squares are summed in float32, so level D's two roundings become
four times two float32 roundings."""


def cases(problem: Problem) -> Iterator[Case]:
    """Yield cases on tokens as the model's head produces them; the state is float32."""
    B, device = problem.batch, problem.device
    values = problem.side**2 * PATCH_CHANNELS
    x = problem.normal(B, values, dtype=torch.float32)
    velocity = problem.normal(2 * B, values, seed=1)
    step, weight = (torch.full((B,), value, dtype=torch.float64, device=device) for value in (0.1, 2.4))

    def plain(x: Tensor, velocity: Tensor) -> Outputs:
        return (reference.euler(x, velocity, step, weight, B),)

    fast = compiled(plain)
    yield Case(
        name=f"ode_step.euler/{problem.label}",
        variants={
            "ours": lambda: (euler_step(x, velocity, step, weight),),
            "eager": lambda: plain(x, velocity),
            "torch.compile": lambda: fast(x, velocity),
        },
        plain=lambda: plain(x, velocity),
        exact=True,
        bytes_moved=2 * size_of(x) + size_of(velocity),
    )
    yield from _attempt(problem, x, velocity, step, weight)


def _attempt(problem: Problem, x: Tensor, velocity: Tensor, step: Tensor, weight: Tensor) -> Iterator[Case]:
    """Yield what an attempt of Dopri5 does with its newest velocities.

    It stores the slope, and updates the state or computes the error norm.
    """
    B, out = problem.batch, torch.empty_like(x)
    slopes = problem.normal(len(ERROR), *x.shape, seed=2, dtype=torch.float32)
    tolerance = torch.tensor(TOLERANCES, dtype=torch.float64, device=problem.device)

    def store(slopes: Tensor, velocity: Tensor) -> Tensor:
        return slopes[-1].copy_(reference.guided(velocity, weight, B, slopes.dtype).view_as(slopes[-1]))

    def plain_stage(x: Tensor, slopes: Tensor, velocity: Tensor) -> Outputs:
        slope = store(slopes, velocity)
        return reference.stage_state(x, slopes, step, SOLUTION), slope

    def plain_error(x: Tensor, slopes: Tensor, velocity: Tensor) -> Outputs:
        slope = store(slopes, velocity)
        return reference.error_norm(x, slopes, step, SOLUTION, ERROR, tolerance, False), slope

    def ours_stage(x: Tensor, slopes: Tensor, velocity: Tensor) -> Outputs:
        stage_state_(out, slopes, x, step, SOLUTION, velocity, weight)
        return out, slopes[-1]

    def ours_error(x: Tensor, slopes: Tensor, velocity: Tensor) -> Outputs:
        norm = error_norm_(slopes, x, step, SOLUTION, ERROR, tolerance, velocity, weight)
        return norm, slopes[-1]

    # Read: state, velocities and stored slopes with nonzero weight. Written: the newest slope, and state or norms.
    of_stage, of_error = (sum(w != 0 for w in row[:-1]) for row in (SOLUTION, ERROR))
    size = size_of(x)
    for name, ours, plain, known, moved, growth in (
        ("stage", ours_stage, plain_stage, slopes[: len(SOLUTION)], (1 + of_stage + 2) * size, None),
        ("error", ours_error, plain_error, slopes, (1 + of_error + 1) * size + size_of(step), (NORM_GROWTH, 1.0)),
    ):
        inputs, moved = (x, known, velocity), moved + size_of(velocity)
        yield _on_slopes(f"ode_step.{name}/{problem.label}", ours, plain, inputs, moved, growth)


def _on_slopes(
    name: str,
    ours: Callable[[Tensor, Tensor, Tensor], Outputs],
    plain: Callable[[Tensor, Tensor, Tensor], Outputs],
    inputs: tuple[Tensor, Tensor, Tensor],
    size: int,
    growth: tuple[float, ...] | None,
) -> Case:
    """Return a case in which each variant writes into its own slopes, so that none can pass with another's result.

    Args:
        name: name of the case.
        ours, plain: functions of state, slopes and velocity that write the last slope.
        inputs: state, slopes and velocity; these slopes are not written to.
        size: bytes read and written.
        growth: see :class:`Case`; None for level A.
    """
    x, slopes, velocity = inputs
    own = [_poisoned(slopes) for _ in range(4)]
    fast = compiled(plain)
    return Case(
        name=name,
        variants={
            "ours": lambda: ours(x, own[0], velocity),
            "eager": lambda: plain(x, own[1], velocity),
            "torch.compile": lambda: fast(x, own[2], velocity),
        },
        plain=lambda: plain(x, own[3], velocity),
        truth=lambda: plain(x.double(), slopes.double(), velocity.double()),
        exact=growth is None,
        growth=growth or 1.0,
        bytes_moved=size,
    )


def _poisoned(slopes: Tensor) -> Tensor:
    """Return a copy whose last slope, which is to be written, is NaN."""
    copy = slopes.clone()
    copy[-1] = torch.nan
    return copy

"""ode_step: guidance and Euler; the last stage of Dopri5 and its error norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pixelflow_kernels.ode_step import euler_step, reference

from .case import PATCH_CHANNELS, Case, Outputs, Problem, compiled, size_of


def cases(problem: Problem) -> Iterator[Case]:
    """On the head's tokens; the state is float32."""
    B = problem.batch
    values = problem.side**2 * PATCH_CHANNELS
    x = problem.normal(B, values, dtype=torch.float32)
    velocity = problem.normal(2 * B, values, seed=1)
    step = torch.full((B,), 0.1, dtype=torch.float64, device=problem.device)
    weight = torch.full((B,), 2.4, dtype=torch.float64, device=problem.device)

    def plain(x: torch.Tensor, velocity: torch.Tensor) -> Outputs:
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

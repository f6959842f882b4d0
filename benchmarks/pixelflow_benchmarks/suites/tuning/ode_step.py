"""ode_step: the Euler step, and Dopri5's last stage, error norm and acceptance, on a float32 state with guidance."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pixelflow_benchmarks.suites.kernels.case import PATCH_CHANNELS, Outputs, Problem
from pixelflow_kernels.configs import arch_of, launch_config
from pixelflow_kernels.ode_step import kernels, norm_kernels, reference
from pixelflow_kernels.ode_step.blocks import SMALL_IMAGE
from pixelflow_kernels.ode_step.specimens import ERROR, STAGES

from .spaces import Config
from .trial import Trial

TOLERANCES = (1e-5, 1e-5)


def trials(kernel: str, problem: Problem) -> Iterator[Trial]:
    """Yield the trial of ``euler``, ``stage``, ``error`` or ``accept``, on tokens as the model's head produces them."""
    B, device = problem.batch, problem.device
    values = problem.side**2 * PATCH_CHANNELS
    x = problem.normal(B, values, dtype=torch.float32)
    velocity = problem.normal(2 * B, values, seed=1)
    step, weight = (torch.full((B,), value, dtype=torch.float64, device=device) for value in (0.1, 2.4))
    slopes = problem.normal(len(ERROR), B, values, seed=2, dtype=torch.float32)
    tolerance = torch.tensor(TOLERANCES, dtype=torch.float64, device=device)
    accept = torch.ones(B, dtype=torch.bool, device=device)
    out, norm = torch.empty_like(x), torch.empty_like(step)
    before_last = slopes[:-1]

    def euler(config: Config) -> Outputs:
        kernels.launch_euler(x, velocity, step, weight, out, B, config=config)
        return (out,)

    def stage(config: Config) -> Outputs:
        kernels.launch_stage(x, before_last, step, STAGES[-1], velocity, weight, out, B, config=config)
        return out, before_last[-1]

    def error(config: Config) -> Outputs:
        norm_kernels.launch_error(
            x, slopes, step, STAGES[-1], ERROR, tolerance, velocity, weight, norm, False, config=config
        )
        return norm, slopes[-1]

    def take(config: Config) -> Outputs:
        kernels.launch_accept(out, slopes, x, accept, config=config)
        return out, slopes[0]

    def norms(dtype: torch.dtype) -> Outputs:
        newest = reference.guided(velocity, weight, B, torch.float32).view_as(x)
        all_slopes = torch.cat([before_last, newest[None]]).to(dtype)
        norm = reference.error_norm(x.to(dtype), all_slopes, step, STAGES[-1], ERROR, tolerance, False)
        return norm.to(dtype), newest  # the norm is only as exact as the type that it is computed in

    launches = {"euler": euler, "stage": stage, "error": error, "accept": take}
    buffers = {
        "euler": (out,),
        "stage": (out, slopes[-2]),
        "error": (norm, slopes[-1]),
        "accept": (out, slopes[0]),
    }
    name = "small" if values <= SMALL_IMAGE else "large"
    is_norm = kernel == "error"
    yield Trial(
        problem=problem.label,
        shape_class=name,
        present=launch_config(f"ode_step.{kernel}", name, arch_of(device)),
        launch=launches[kernel],
        buffers=buffers[kernel],
        exact=(1,) if is_norm else range(len(buffers[kernel])),
        plain=(lambda: norms(torch.float32)) if is_norm else None,
        truth=(lambda: norms(torch.float64)) if is_norm else None,
        jit=norm_kernels._error_kernel if is_norm else getattr(kernels, f"_{kernel}_kernel"),
    )

"""cascade: entering a stage with drawn or given noise, the first stage's noise, training pairs of all stages."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pixelflow_benchmarks.suites.kernels.cascade import ALPHA, BETA, CHANNELS, PATCH
from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES, Outputs, Problem
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.cascade import kernels, pairs
from pixelflow_kernels.configs import arch_of, launch_config

from .spaces import Config
from .trial import Trial


def trials(kernel: str, problem: Problem) -> Iterator[Trial]:
    """Yield trials of ``renoise`` from the second stage on, ``initial`` at the first, or ``pairs`` at the last."""
    if kernel == "renoise" and problem.stage > 0:
        for drawn in (True, False):
            yield _renoise(problem, drawn)
    if kernel == "initial" and problem.stage == 0:
        yield _initial(problem)
    if kernel == "pairs" and problem.stage == len(STAGE_SIDES) - 1:
        yield _pairs(problem)


def _renoise(problem: Problem, drawn: bool) -> Trial:
    side = problem.side * PATCH
    x = problem.normal(problem.batch, CHANNELS, side // 2, side // 2, dtype=torch.float32)
    noise = None if drawn else problem.normal(problem.batch, CHANNELS, side, side, seed=1, dtype=torch.float32)
    seeds = torch.arange(problem.batch, device=problem.device) if drawn else None
    out = x.new_empty(problem.batch, CHANNELS, side, side)
    name = kernels.renoise_class(side // 2)

    def launch(config: Config) -> Outputs:
        kernels.launch_renoise(x, noise, seeds, out, problem.stage, ALPHA, BETA, config=config)
        return (out,)

    return Trial(
        problem=f"{problem.label}-{'drawn' if drawn else 'given'}",
        shape_class=name,
        present=launch_config("cascade.renoise", name, arch_of(problem.device)),
        launch=launch,
        buffers=(out,),
        exact=(0,),
        jit=kernels._renoise_kernel,
    )


def _initial(problem: Problem) -> Trial:
    side = problem.side * PATCH
    seeds = torch.arange(problem.batch, device=problem.device)
    out = torch.empty(problem.batch, CHANNELS, side, side, device=problem.device)

    def launch(config: Config) -> Outputs:
        kernels.launch_initial(seeds, out, config=config)
        return (out,)

    return Trial(
        problem=problem.label,
        shape_class="all",
        present=launch_config("cascade.initial", "all", arch_of(problem.device)),
        launch=launch,
        buffers=(out,),
        exact=(0,),
        jit=kernels._initial_kernel,
    )


def _pairs(problem: Problem) -> Trial:
    side, device = problem.side * PATCH, problem.device
    per_stage = max(problem.batch // len(STAGE_SIDES), 1)
    layout = PackedLayout.from_grids([(n, n) for n in reversed(STAGE_SIDES) for _ in range(per_stage)], device)
    count = layout.num_images
    generator = torch.Generator(device).manual_seed(5)
    shape = (count, CHANNELS, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    index = torch.arange(count, device=device)
    tau = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
    spans = torch.tensor([[0, 1 / 4], [1 / 7, 1 / 2], [1 / 3, 3 / 4], [3 / 5, 1]], dtype=torch.float64, device=device)
    tokens, targets = (_empty(layout, device) for _ in range(2))

    def launch(config: Config) -> Outputs:
        pairs.launch_pairs(
            images, index, None, layout.cu_seqlens, spans, tau, index, None, tokens, targets, PATCH, config=config
        )
        return tokens, targets

    return Trial(
        problem=problem.label,
        shape_class="all",
        present=launch_config("cascade.pairs", "all", arch_of(device)),
        launch=launch,
        buffers=(tokens, targets),
        exact=(0, 1),
        jit=pairs._pair_kernel,
    )


def _empty(layout: PackedLayout, device: torch.device) -> Tensor:
    return torch.empty(layout.num_tokens, CHANNELS * PATCH**2, device=device)

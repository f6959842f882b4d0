"""cascade: entering a stage, with noise drawn in the kernel or given; training pairs from uint8 images."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.cascade import reference, training_pairs, upsample_draw_renoise, upsample_renoise

from .case import STAGE_SIDES, Case, Problem, size_of

PATCH, CHANNELS, ALPHA, BETA = 4, 3, 0.8, 0.6


def cases(problem: Problem) -> Iterator[Case]:
    """Yield renoising on entry to this stage, except the first; at the last stage also training pairs of all stages."""
    if problem.stage > 0:
        yield from _renoise(problem)
    if problem.stage == len(STAGE_SIDES) - 1:
        yield _pairs(problem)


def _renoise(problem: Problem) -> Iterator[Case]:
    side = problem.side * PATCH
    x = problem.normal(problem.batch, CHANNELS, side // 2, side // 2, dtype=torch.float32)
    noise = problem.normal(problem.batch, CHANNELS, side, side, seed=1, dtype=torch.float32)
    seeds = torch.arange(problem.batch, device=problem.device) + 7
    stage, shape = problem.stage, (CHANNELS, side, side)

    def drawn() -> torch.Tensor:
        z = reference.from_blocks(reference.correlate(reference.block_normals(seeds, stage, shape)))
        return reference.upsample_renoise(x, z, ALPHA, BETA)

    yield Case(
        name=f"cascade.draw_renoise/{problem.label}",
        variants={
            "ours": lambda: (upsample_draw_renoise(x, seeds, stage=stage, alpha=ALPHA, beta=BETA),),
            "eager": lambda: (drawn(),),
        },
        plain=lambda: (drawn(),),
        exact=True,
        bytes_moved=size_of(x, noise),
    )
    yield Case(
        name=f"cascade.renoise/{problem.label}",
        variants={
            "ours": lambda: (upsample_renoise(x, noise, alpha=ALPHA, beta=BETA),),
            "eager": lambda: (reference.upsample_renoise(x, noise, ALPHA, BETA),),
        },
        plain=lambda: (reference.upsample_renoise(x, noise, ALPHA, BETA),),
        exact=True,
        bytes_moved=size_of(x, noise, noise),
    )


def _pairs(problem: Problem) -> Case:
    side, device = problem.side * PATCH, problem.device
    per_stage = max(problem.batch // len(STAGE_SIDES), 1)
    grids = [(tokens, tokens) for tokens in reversed(STAGE_SIDES) for _ in range(per_stage)]
    layout, n = PackedLayout.from_grids(grids, device), len(grids)
    generator = torch.Generator(device).manual_seed(5)
    images = torch.randint(0, 256, (n, CHANNELS, side, side), dtype=torch.uint8, device=device, generator=generator)
    index = torch.arange(n, device=device)
    tau = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
    spans = torch.tensor([[0, 1 / 4], [1 / 7, 1 / 2], [1 / 3, 3 / 4], [3 / 5, 1]], dtype=torch.float64, device=device)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        return reference.training_pairs(images, index, None, layout.cu_seqlens, spans, tau, index, None, PATCH)

    tokens = layout.num_tokens * CHANNELS * PATCH**2
    return Case(
        name=f"cascade.training_pairs/{problem.label}",
        variants={
            "ours": lambda: training_pairs(
                images, layout, index=index, spans=spans, tau=tau, patch_size=PATCH, seeds=index
            ),
            "eager": plain,
        },
        plain=plain,
        exact=True,
        bytes_moved=size_of(images) + 2 * 4 * tokens,
    )

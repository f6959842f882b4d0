"""adamw: sums of squares and the update, for the parameters of several blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pixelflow_benchmarks.suites.kernels.adamw import block_shapes
from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES, Outputs, Problem
from pixelflow_kernels.adamw import TensorTable, kernels, reference
from pixelflow_kernels.configs import arch_of, launch_config

from .spaces import Config
from .trial import Trial

LISTS = ("gradients", "parameters", "exp_avgs", "exp_avg_sqs", "averages")


def trials(kernel: str, problem: Problem) -> Iterator[Trial]:
    """Yield the trial of ``squares`` or ``update``: one for all stages, at the last one."""
    if problem.stage == len(STAGE_SIDES) - 1:
        yield {"squares": _squares, "update": _update}[kernel](problem)


def _squares(problem: Problem) -> Trial:
    gradients, device = _lists(problem, problem.normal(1, _size(problem), dtype=torch.float32))[0], problem.device
    table, norm = TensorTable.of({"gradients": gradients}), torch.empty(1, device=device)

    def launch(config: Config) -> Outputs:
        kernels.launch_norm(table.pointers, table.chunks, torch.float32, norm, {"squares": config})
        return (norm,)

    return Trial(
        problem=problem.label,
        shape_class="all",
        present=launch_config("adamw.squares", "all", arch_of(device)),
        launch=launch,
        buffers=(norm,),
        plain=lambda: (reference.gradient_norm(gradients).view(1),),
        truth=lambda: (torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]).double()).view(1),),
        jit=kernels._squares_kernel,
    )


def _update(problem: Problem) -> Trial:
    device = problem.device
    before = problem.normal(len(LISTS), _size(problem), dtype=torch.float32).abs_()
    state = before.clone()
    table = TensorTable.of(dict(zip(LISTS, _lists(problem, state), strict=True)))
    found = reference.numbers(1.0, 1e-4, 100, 0.9, 0.999, 1e-8, 0.01, 1.0, 0.9999)
    numbers = torch.tensor(found, dtype=torch.float64, device=device).float()

    def launch(config: Config) -> Outputs:
        # The kernel works in place: this copy, which all candidates pay alike, gives every launch the same state.
        state.copy_(before)
        kernels.launch_update(table.pointers, table.chunks, numbers, torch.float32, None, True, False, config=config)
        return (state,)

    return Trial(
        problem=problem.label,
        shape_class="all",
        present=launch_config("adamw.update", "all", arch_of(device)),
        launch=launch,
        buffers=(state,),
        exact=(0,),
        jit=kernels._update_kernel,
    )


def _size(problem: Problem) -> int:
    return sum(torch.Size(shape).numel() for shape in block_shapes()) * max(problem.batch // 2, 1)


def _lists(problem: Problem, flat: Tensor) -> list[list[Tensor]]:
    """Split each row of ``flat`` into consecutive tensors of the blocks' shapes."""
    shapes = block_shapes() * max(problem.batch // 2, 1)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [[x.view(shape) for x, shape in zip(row.split(sizes), shapes, strict=True)] for row in flat]

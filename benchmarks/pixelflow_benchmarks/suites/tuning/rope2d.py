"""rope2d: norm and rotation of q and k, slices of a fused product; its backward pass; the rotation alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.suites.kernels.case import HEAD_DIM, HEADS, WIDTH, Outputs, Problem
from pixelflow_kernels.configs import arch_of, launch_config
from pixelflow_kernels.rope2d import backward, forward, reference, rotation, rotation_table

from .spaces import Config
from .trial import Trial

EPS = 1e-6


def trials(kernel: str, problem: Problem) -> Iterator[Trial]:
    """Yield the trial of ``forward``, ``backward`` or ``rotate``."""
    name = rotation.shape_class(WIDTH, problem.dtype)
    shared = {
        "problem": problem.label,
        "shape_class": name,
        "present": launch_config(f"rope2d.{kernel}", name, arch_of(problem.device)),
        "jit": {
            "rotate": rotation._rotate_kernel,
            "forward": forward._rope2d_forward_kernel,
            "backward": backward._rope2d_backward_kernel,
        }[kernel],
    }
    yield (_rotate if kernel == "rotate" else _norm)(kernel, problem, shared)


def _rotate(kernel: str, problem: Problem, shared: dict[str, Any]) -> Trial:
    layout = problem.layout()
    table = rotation_table(layout, HEAD_DIM)
    x = problem.normal(layout.num_tokens, WIDTH)
    out = torch.empty_like(x)

    def launch(config: Config) -> Outputs:
        rotation.launch_rotate(x, layout.row, layout.column, table, out, HEAD_DIM, False, config=config)
        return (out,)

    return Trial(**shared, launch=launch, buffers=(out,), exact=(0,))


def _norm(kernel: str, problem: Problem, shared: dict[str, Any]) -> Trial:
    layout = problem.layout()
    row, column, table = layout.row, layout.column, rotation_table(layout, HEAD_DIM)
    product = problem.normal(layout.num_tokens, 3 * WIDTH)
    q, k = product[:, :WIDTH], product[:, WIDTH : 2 * WIDTH]
    q_weight, k_weight = 1 + 0.1 * problem.normal(2, WIDTH, dtype=table.dtype)
    grad_q, grad_k = (problem.normal(layout.num_tokens, WIDTH, seed=i) for i in (1, 2))
    out_q, out_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))

    def launch_forward(config: Config) -> Outputs:
        forward.launch_forward(
            q, k, q_weight, k_weight, row, column, table, out_q, out_k, HEAD_DIM, EPS, True, config=config
        )  # fmt: skip
        return out_q, out_k

    def launch_backward(config: Config) -> Outputs:
        weights = backward.launch_backward(
            grad_q, grad_k, q, k, q_weight, k_weight, row, column, table, out_q, out_k, HEAD_DIM, EPS, True,
            config=config,
        )  # fmt: skip
        return out_q, out_k, *weights

    def computed(dtype: torch.dtype | None) -> Outputs:
        """Compute all outputs with the operands in their own types, or all in ``dtype``."""
        leaves = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k, q_weight, k_weight))
        angles = rotation_table(layout, HEAD_DIM, dtype or table.dtype)
        found = tuple(_normed(x, weight, row, column, angles) for x, weight in zip(leaves[:2], leaves[2:], strict=True))
        if kernel == "forward":
            return tuple(x.detach() for x in found)
        return torch.autograd.grad(found, leaves, tuple(g.to(dtype or g.dtype) for g in (grad_q, grad_k)))

    return Trial(
        **shared,
        launch=launch_forward if kernel == "forward" else launch_backward,
        buffers=(out_q, out_k),
        plain=lambda: computed(None),
        truth=lambda: computed(torch.float64),
    )


def _normed(x: Tensor, weight: Tensor, row: Tensor, column: Tensor, table: Tensor) -> Tensor:
    heads = reference.rms_norm(x, weight, EPS, table.dtype).unflatten(-1, (HEADS, HEAD_DIM))
    return reference.rotate(heads, row, column, table).flatten(1)

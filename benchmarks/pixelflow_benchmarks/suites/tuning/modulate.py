"""modulate: gated residual, norm and modulation, forward and backward, with RMSNorm and with LayerNorm.

The two kernels of the backward pass are launched together, one with the candidate configuration, the other with its
frozen one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pixelflow_benchmarks.suites.kernels.case import WIDTH, Outputs, Problem
from pixelflow_kernels.configs import arch_of, launch_config
from pixelflow_kernels.modulate import backward, forward, reference

from .spaces import Config
from .trial import Trial

EPS = 1e-6


def trials(kernel: str, problem: Problem) -> Iterator[Trial]:
    """Yield trials of ``forward``, ``backward`` or ``sum``, with both norms."""
    for norm in ("rms", "layer"):
        yield _trial(kernel, problem, norm)


def _trial(kernel: str, problem: Problem, norm: str) -> Trial:
    layout = problem.layout()
    high = torch.promote_types(problem.dtype, torch.float32)
    x, y, grad_residual, grad = (problem.normal(layout.num_tokens, WIDTH, seed=seed) for seed in range(4))
    six = problem.normal(layout.num_images, 6 * WIDTH, seed=4, dtype=high)
    gate, shift, scale = six.chunk(6, dim=-1)[:3]
    weight = 1 + 0.1 * problem.normal(WIDTH, seed=5, dtype=high) if norm == "rms" else None
    residual, out = reference.add_gated(x, y, gate, layout.image_index), torch.empty_like(x)
    grad_x, grad_y = torch.empty_like(x), torch.empty_like(x)
    rows = x.new_empty(3, layout.num_images, WIDTH, dtype=high)

    def launch_forward(config: Config) -> Outputs:
        forward.launch_forward(x, y, gate, weight, shift, scale, layout.image_index, residual, out, EPS, config=config)
        return residual, out

    def launch_backward(config: Config) -> Outputs:
        backward.launch_backward(
            grad, grad_residual, residual, y, gate, weight, scale, layout.cu_seqlens, grad_x, grad_y, rows, EPS,
            config=config if kernel == "backward" else None,
            sum_config=config if kernel == "sum" else None,
        )  # fmt: skip
        return grad_x, grad_y, rows

    def computed(dtype: torch.dtype | None) -> Outputs:
        """Compute all outputs with the operands in their own types, or all in ``dtype``."""
        leaves = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, y, gate, shift, scale))
        own = None if weight is None else weight.to(dtype or weight.dtype)
        total = reference.add_gated(leaves[0], leaves[1], leaves[2], layout.image_index)
        normed = reference.modulate(reference.norm(total, own, EPS), leaves[3], leaves[4], layout.image_index)
        if kernel == "forward":
            return total.detach(), normed.detach()
        seeds = tuple(g.to(dtype or g.dtype) for g in (grad_residual, grad))
        dx, dy, dgate, dshift, dscale = torch.autograd.grad((total, normed), leaves, seeds)
        # The kernel's sums do not include the norm's weight, which its caller applies.
        return dx, dy, torch.stack([dscale if own is None else dscale / own, dshift, dgate])

    jits = {
        "forward": forward._modulate_forward_kernel,
        "backward": backward._modulate_backward_kernel,
        "sum": backward._sum_kernel,
    }
    name = "any" if kernel == "sum" else forward.shape_class(WIDTH, x.dtype)
    return Trial(
        problem=f"{problem.label}-{norm}",
        shape_class=name,
        present=launch_config(f"modulate.{kernel}", name, arch_of(problem.device)),
        launch=launch_forward if kernel == "forward" else launch_backward,
        buffers=(residual, out) if kernel == "forward" else (grad_x, grad_y, rows),
        exact=(0,) if kernel == "forward" else (),
        plain=lambda: computed(None),
        truth=lambda: computed(torch.float64),
        jit=jits[kernel],
    )

"""modulate: gated residual, norm and modulation, forward and with the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pixelflow_kernels.modulate import (
    add_gated_layer_norm_modulate,
    add_gated_rms_norm_modulate,
    layer_norm_modulate,
    reference,
)

from .case import WIDTH, Case, Outputs, Problem, compiled, size_of

EPS = 1e-6


def cases(problem: Problem) -> Iterator[Case]:
    """Yield, each forward and with gradients: RMSNorm before the MLP, LayerNorm after it, and a block's first norm.

    The first two also add the gated residual.
    """
    layout = problem.layout()
    image = layout.image_index
    x, y = (problem.normal(layout.num_tokens, WIDTH, seed=seed) for seed in (0, 1))
    six = problem.normal(layout.num_images, 6 * WIDTH, seed=2, dtype=torch.float32)
    gate, shift, scale = six.chunk(6, dim=-1)[:3]
    weight = 1 + 0.1 * problem.normal(WIDTH, seed=3, dtype=torch.float32)

    def plain_first(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        return (reference.modulate(reference.norm(x, None, EPS), shift, scale, image),)

    def plain_rms(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        residual = reference.add_gated(x, y, gate, image)
        return residual, reference.modulate(reference.norm(residual, weight, EPS), shift, scale, image)

    def plain_layer(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        residual = reference.add_gated(x, y, gate, image)
        return residual, reference.modulate(reference.norm(residual, None, EPS), shift, scale, image)

    def ours_first(x: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        return (layer_norm_modulate(x, shift, scale, layout, eps=EPS),)

    def ours_rms(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        return add_gated_rms_norm_modulate(x, y, gate, weight, shift, scale, layout, eps=EPS)

    def ours_layer(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Outputs:
        return add_gated_layer_norm_modulate(x, y, gate, shift, scale, layout, eps=EPS)

    yield from _both("rms_residual", problem, image, ours_rms, plain_rms, (x, y, gate, weight, shift, scale), outputs=2)
    yield from _both("layer_residual", problem, image, ours_layer, plain_layer, (x, y, gate, shift, scale), outputs=2)
    yield from _both("layer", problem, image, ours_first, plain_first, (x, shift, scale), outputs=1)


def _both(
    name: str,
    problem: Problem,
    image: Tensor,
    ours: Callable[..., Outputs],
    plain: Callable[..., Outputs],
    inputs: tuple[Tensor, ...],
    outputs: int,
) -> Iterator[Case]:
    fast = compiled(plain)
    x = inputs[0]
    yield Case(
        name=f"modulate.{name}.forward/{problem.label}",
        variants={
            "ours": lambda: ours(*inputs),
            "eager": lambda: plain(*inputs),
            "torch.compile": lambda: fast(*inputs),
        },
        plain=lambda: plain(*inputs),
        truth=lambda: plain(*(t.double() for t in inputs)),
        bytes_moved=size_of(*inputs, image) + outputs * size_of(x),
    )
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
    grads = tuple(problem.normal(*x.shape, seed=10 + i) for i in range(outputs))

    def backward(function: Callable[..., Outputs], leaves: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Outputs:
        return torch.autograd.grad(function(*leaves), leaves, grads)

    def truth() -> Outputs:
        """Compute all images at once: 15 GB at the last stage with 16 guided images."""
        return backward(plain, tuple(t.double().requires_grad_() for t in inputs), tuple(g.double() for g in grads))

    # Forward: operands and outputs. Backward: the residual again (and y where there is a gate) with all rows except the
    # shift; gradients in and out.
    again = size_of(*inputs[:-2], inputs[-1], image)
    yield Case(
        name=f"modulate.{name}.forward+backward/{problem.label}",
        variants={
            "ours": lambda: backward(ours, leaves, grads),
            "eager": lambda: backward(plain, leaves, grads),
        },
        plain=lambda: backward(plain, leaves, grads),
        truth=truth,
        bytes_moved=2 * size_of(*inputs) + size_of(image) + outputs * size_of(x) + again + size_of(*grads),
    )

"""Operands for the modulate tests, and an independent implementation in float64 without the project's code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixelflow_engine import layers
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.modulate import (
    add_gated_layer_norm_modulate,
    add_gated_rms_norm,
    add_gated_rms_norm_modulate,
    add_rms_norm_modulate,
    layer_norm_modulate,
)
from pixelflow_kernels.packing import Run

from .kernels import assert_filled, assert_level_d, poisoned_like, surrounded

EPS = 1e-6
ROUNDINGS = 6  # see sizes


class Operands(NamedTuple):
    """Operands of one call; None where a variant has no such operand."""

    x: Tensor
    y: Tensor | None
    gate: Tensor | None
    weight: Tensor | None
    shift: Tensor | None
    scale: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        return Operands(*(None if t is None else function(t) for t in self))

    def leaves(self, dtype: torch.dtype | None = None) -> Operands:
        """Return copies that require gradients, in their own types or in ``dtype``."""
        return self.map(lambda t: t.detach().to(dtype or t.dtype, copy=True).requires_grad_())

    @property
    def given(self) -> list[Tensor]:
        return [t for t in self if t is not None]


@dataclass(frozen=True)
class Variant:
    function: Callable[..., Any]
    names: tuple[str, ...]  # names of its operands, in the order of Operands

    def __call__(self, operands: Operands, layout: PackedLayout, eps: float = EPS) -> tuple[Tensor, Tensor]:
        """Call the public function; return residual (x itself if nothing is added) and normed tokens."""
        out = self.function(*operands.given, layout, eps=eps)
        return out if isinstance(out, tuple) else (operands.x, out)


VARIANTS = {
    v.function.__name__: v
    for v in (
        Variant(layer_norm_modulate, ("x", "shift", "scale")),
        Variant(add_gated_layer_norm_modulate, ("x", "y", "gate", "shift", "scale")),
        Variant(add_gated_rms_norm_modulate, ("x", "y", "gate", "weight", "shift", "scale")),
        Variant(add_gated_rms_norm, ("x", "y", "gate", "weight")),
        Variant(add_rms_norm_modulate, ("x", "y", "weight", "shift", "scale")),
    )
}


def layout_of(lengths: Sequence[int], device: str = "cpu") -> PackedLayout:
    """Return a layout of images with one row each, also of images without tokens, which grids cannot express."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    index = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(sizes)
    columns = [torch.arange(n, dtype=torch.int32) for n in lengths]
    runs, image, token = [], 0, 0
    for length, group in groupby(lengths):
        count = len(list(group))
        runs.append(Run(slice(image, image + count), slice(token, token + count * length), count, (1, length)))
        image, token = image + count, token + count * length
    return PackedLayout(
        grids=tuple((1, n) for n in lengths),
        cu_seqlens=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32).to(device),
        image_index=index.to(device),
        row=torch.zeros_like(index).to(device),
        column=torch.cat([index[:0], *columns]).to(device),
        runs=tuple(runs),
    )


def make(
    variant: Variant,
    layout: PackedLayout,
    width: int,
    dtype: torch.dtype,
    *,
    std: float = 1.0,
    mean: float = 0.0,
    seed: int = 0,
) -> Operands:
    """Draw operands on the CPU: tokens of any mean amid NaN, rows as slices of wider products, no two strides alike."""
    generator = torch.Generator().manual_seed(seed)
    high_type = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = surrounded((mean + std * normal(layout.num_tokens, width)).to(dtype)), None
    if "y" in variant.names:
        y = surrounded((std * normal(layout.num_tokens, 2 * width)).to(dtype))[:, :width]
    rows = surrounded(0.5 * normal(layout.num_images, 6 * width).to(high_type)).chunk(6, dim=-1)
    gate = surrounded(0.5 * normal(layout.num_images, 2 * width).to(high_type))[:, width:]
    weight = (1 + 0.3 * normal(width)).to(torch.bfloat16 if dtype == torch.bfloat16 else high_type)
    every = Operands(x, y, gate, weight, rows[3], rows[4])
    return Operands(*(t if name in variant.names else None for name, t in every._asdict().items()))


def plain(operands: Operands, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Apply the engine's layers one after the other, in the operands' types."""
    x, y, gate, weight, shift, scale = operands
    if y is not None:
        x = x + y if gate is None else layers.add_gated(x, y, gate, layout)
    normed = layers.layer_norm(x) if weight is None else layers.rms_norm(x, weight)
    return x, normed if shift is None or scale is None else layers.modulate(normed, shift, scale, layout)


def of_tokens(row: Tensor, layout: PackedLayout) -> Tensor:
    return row.repeat_interleave(layout.cu_seqlens.diff().long(), dim=0)


def _unit(x: Tensor, is_layer_norm: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Normalize tokens, after removing the mean for LayerNorm; return them and the length they were divided by."""
    width = x.shape[-1]
    if is_layer_norm:
        x = x - x @ x.new_full((width, 1), 1 / width)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(width)
    length = torch.hypot(length, torch.full((), math.sqrt(eps), dtype=x.dtype))
    return x / length, length


def residual(operands: Operands, layout: PackedLayout) -> Tensor:
    """Return ``x + gate y`` in the operands' type, without rounding to a smaller one; differentiable."""
    x, y, gate, *_ = operands
    return x if y is None else x + (y if gate is None else of_tokens(gate, layout) * y)


def normed(residual: Tensor, operands: Operands, layout: PackedLayout, eps: float = EPS) -> Tensor:
    """Return normed and modulated tokens of a residual in float64, without intermediate rounding; differentiable."""
    _, _, _, weight, shift, scale = operands
    out, _ = _unit(residual, weight is None, eps)
    out = out if weight is None else weight * out
    if shift is not None and scale is not None:
        out = out + of_tokens(scale, layout) * out + of_tokens(shift, layout)
    return out


def truth(operands: Operands, layout: PackedLayout, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return residual and normed tokens in float64, without intermediate rounding; differentiable."""
    high = operands.map(Tensor.double)
    added = residual(high, layout)
    return added, normed(added, high, layout, eps)


def magnitudes(
    operands: Operands, layout: PackedLayout, grads: tuple[Tensor | None, Tensor], common: float = 0.0
) -> dict[str, Tensor]:
    """Return the sum of the magnitudes of each element's terms, of the norm (``out``) and of the gradients by name.

    A result may be much smaller where its terms cancel; then neither the kernel nor PyTorch can do better. The residual
    is that of the operands' type, which is what the norm gets. ``common`` times the mean size of a normalised token is
    added to that of each of its elements: a mean that is subtracted gives them all a common error.
    """
    added = plain(operands, layout)[0].detach().double()
    _, y, gate, weight, shift, scale = operands.map(lambda t: t.detach().double())
    grad_residual, grad = (None if g is None else g.double().abs() for g in grads)
    assert grad is not None
    unit, length = _unit(added, weight is None, EPS)
    factor = torch.ones_like(unit) if weight is None else weight.abs() * torch.ones_like(unit)
    around = torch.zeros_like(unit)
    if shift is not None and scale is not None:
        factor = factor * (1 + of_tokens(scale, layout).abs())
        around = of_tokens(shift, layout).abs()
    unit = unit.abs() + common * unit.abs().mean(-1, keepdim=True)
    along = grad * factor
    along = (along + along.mean(-1, keepdim=True) + unit * (along * unit).mean(-1, keepdim=True)) / length
    along = along if grad_residual is None else along + grad_residual

    def of_images(x: Tensor) -> Tensor:
        parts = [part.sum(0) for part in x.split(layout.cu_seqlens.diff().tolist())] if layout.num_images else []
        return torch.stack([x.new_zeros(x.shape[-1]), *parts])[1:]

    found = {"out": unit * factor + around, "grad x": along, "grad y": along}
    if y is not None and gate is not None:
        found["grad y"] = of_tokens(gate, layout).abs() * along
        found["grad gate"] = of_images(along * y.abs())
    found["grad shift"] = of_images(grad)
    found["grad scale"] = of_images(grad * unit * (1 if weight is None else weight.abs()))
    found["grad weight"] = (grad * unit * (factor if weight is None else factor / weight.abs())).sum(0)
    return found


def sizes(operands: Operands, layout: PackedLayout, grads: tuple[Tensor | None, Tensor]) -> dict[str, float]:
    """Return each result's size of rounding errors: half the number of roundings times the magnitudes in an element.

    Each element is a product of rounded factors; on the shortest path six values are rounded: ``1 + scale`` and weight,
    token and mean, mean square and reciprocal. (Level D counts two.)
    """
    found = magnitudes(operands, layout, grads)
    return {name: ROUNDINGS / 2 * (x.max().item() if x.numel() else 0.0) for name, x in found.items()}


def assert_close(out: Tensor, plain: Tensor, truth: Tensor, name: str, size: float) -> None:
    """Assert level D at ``size`` (see :func:`sizes`); float64 has a fixed tolerance, as its truth rounds as much."""
    if out.dtype == torch.float64:
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-10 * size, msg=lambda m: f"{name}: {m}")
    else:
        assert_level_d(out, plain, truth, name, size)


def gradients(
    function: Callable[[Operands, PackedLayout], tuple[Tensor, Tensor]],
    operands: Operands,
    layout: PackedLayout,
    grads: tuple[Tensor | None, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return operands' gradients by name; ``grads`` are those of the residual (None if unused) and normed tokens."""
    leaves = operands.leaves(dtype)
    pairs = [(out, grad) for out, grad in zip(function(leaves, layout), grads, strict=True) if grad is not None]
    outs, given = zip(*((out, grad.to(out.dtype)) for out, grad in pairs), strict=True)
    found = torch.autograd.grad(outs, leaves.given, given)
    names = [name for name, t in operands._asdict().items() if t is not None]
    return {f"grad {name}": g for name, g in zip(names, found, strict=True)}


def random_grads(variant: Variant, operands: Operands, seed: int = 5) -> tuple[Tensor | None, Tensor]:
    """Draw gradients of the residual, if there is one, and of the normed tokens; in the tokens' type, between NaN."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width = operands.x.shape
    residual = surrounded(torch.randn(tokens, 3 * width, generator=generator).to(operands.x.dtype))[
        :, width : 2 * width
    ]
    normed = surrounded(torch.randn(tokens, width, generator=generator).to(operands.x.dtype))
    return residual if "y" in variant.names else None, normed


def forward(operands: Operands, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """Run the kernel into poisoned outputs; return residual (x itself if nothing is added) and normed tokens."""
    from pixelflow_kernels.modulate.forward import launch_forward

    residual = None if operands.y is None else poisoned_like(operands.x)
    out = poisoned_like(operands.x)
    launch_forward(*operands, layout.image_index, None if residual is None else residual.out, out.out, EPS)
    assert_filled(*out)
    if residual is None:
        return operands.x, out.out
    assert_filled(*residual, "residual")
    return residual.out, out.out

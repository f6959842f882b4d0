"""What rounding to a 16-bit type costs modulate: the errors that no kernel can avoid, element by element.

Such a kernel rounds the residual, whose bits are given (level A), the norm, the output and the gradients of tokens and
weight. Everything else is float32. The truth is therefore computed from the rounded residual, and the bounds leave room
for a rounding of each result and for float32 arithmetic. Plain PyTorch in a 16-bit type is no measure: its autograd
rounds what a sum over thousands of tokens is made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout

from . import modulate
from .modulate import Operands

SINGLE = torch.finfo(torch.float32).eps / 2
CHAIN = 16
"""Roundings to float32 on the way of one element, apart from its sums; more than any variant has."""


@dataclass(frozen=True)
class Bound:
    """The true values of a result, and how far each element may be off before it is rounded to the result's type."""

    true: Tensor
    arithmetic: Tensor

    def check(self, name: str, found: Tensor) -> None:
        """Assert that a result is within float32's error, and that of rounding it once, of its true values."""
        assert found.shape == self.true.shape, f"{name}: {tuple(found.shape)}, expected {tuple(self.true.shape)}"
        info = torch.finfo(found.dtype)
        unit = info.eps / 2
        # Below the smallest normal number the distance of two numbers does not shrink further.
        bound = self.arithmetic + unit * torch.clamp(self.true.abs() + self.arithmetic, min=info.tiny)
        error = (found.double() - self.true).abs()
        beyond = ~(error <= bound)  # also where it is NaN
        assert not bool(beyond.any()), (
            f"{name}: {int(beyond.sum())} of {error.numel()} elements are further off than roundings explain; "
            f"the first by {error[beyond][0]:.3e}, bound {bound[beyond][0]:.3e}"
        )


def rounded_residual(operands: Operands, layout: PackedLayout, given: Operands) -> Tensor:
    """The residual in float64, differentiable, with the values of eager PyTorch's in the type of ``given``."""
    exact = modulate.residual(operands, layout)
    return exact + (modulate.plain(given, layout)[0].double() - exact).detach()


def bounds(operands: Operands, layout: PackedLayout, grads: tuple[Tensor | None, Tensor]) -> dict[str, Bound]:
    """Bounds of the norm (``out``) and of the gradients by name.

    A sum of n terms in any order has an error of at most n roundings of the sum of their magnitudes. The normalised
    token has an error of roundings of its own size and of its tokens' mean size, from the means that are subtracted.
    """

    def truth(leaves: Operands, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        residual = rounded_residual(leaves, layout, operands)
        return residual, modulate.normed(residual, leaves, layout)

    true = modulate.gradients(truth, operands, layout, grads, torch.float64)
    sizes = modulate.magnitudes(operands, layout, grads, common=1.0)
    width, lengths = operands.x.shape[1], layout.cu_seqlens.diff().double()
    of_token = (width + CHAIN) * SINGLE
    of_image = of_token + lengths[:, None] * SINGLE
    of_pack = of_token + (lengths.sum() + lengths.numel()) * SINGLE
    errors = {"grad x": of_token, "grad y": of_token, "grad weight": of_pack}
    found = {name: Bound(value, errors.get(name, of_image) * sizes[name]) for name, value in true.items()}
    return {"out": _of_output(operands, layout, of_token), **found}


def _of_output(operands: Operands, layout: PackedLayout, of_token: float) -> Bound:
    """The norm is rounded to the tokens' type before it is modulated."""
    exact = operands.map(Tensor.double)
    residual = rounded_residual(exact, layout, operands)
    unmodulated = exact._replace(shift=None, scale=None)
    norm = modulate.normed(residual, unmodulated, layout)
    arithmetic = of_token * (norm.abs() + norm.abs().mean(-1, keepdim=True))
    if exact.shift is None or exact.scale is None:
        return Bound(norm, arithmetic)
    info = torch.finfo(operands.x.dtype)
    arithmetic = arithmetic + info.eps / 2 * torch.clamp(norm.abs() + arithmetic, min=info.tiny)
    factor, shift = 1 + modulate.of_tokens(exact.scale, layout), modulate.of_tokens(exact.shift, layout)
    sizes = (norm * factor).abs() + norm.abs() + shift.abs()
    return Bound(norm * factor + shift, arithmetic * factor.abs() + 4 * SINGLE * sizes)


class Expected:
    """What the norm and the gradients of a call must be, in any type.

    In 16 bits the bounds are those of this module. In float32, where there are only roundings to float32, and in
    float64 they are those of :func:`support.modulate.assert_close`.
    """

    def __init__(self, operands: Operands, layout: PackedLayout, grads: tuple[Tensor | None, Tensor]) -> None:
        self.bounds: dict[str, Bound] | None = None
        if operands.x.dtype.itemsize == 2:
            self.bounds = bounds(operands, layout, grads)
            return
        self.sizes = modulate.sizes(operands, layout, grads)
        self.plain = modulate.gradients(modulate.plain, operands, layout, grads)
        self.truth = modulate.gradients(modulate.truth, operands, layout, grads, torch.float64)
        self.plain["out"], self.truth["out"] = modulate.plain(operands, layout)[1], modulate.truth(operands, layout)[1]

    def check(self, name: str, found: Tensor) -> None:
        """Assert that the norm (``out``) or the gradient of that name is right."""
        if self.bounds is not None:
            self.bounds[name].check(name, found)
        else:
            modulate.assert_close(found, self.plain[name], self.truth[name], name, self.sizes[name])

    def check_gradients(self, found: dict[str, Tensor]) -> None:
        """Assert that there is a right gradient for every operand, and no other."""
        names = self.truth if self.bounds is None else self.bounds
        assert found.keys() == names.keys() - {"out"}
        for name, gradient in found.items():
            self.check(name, gradient)

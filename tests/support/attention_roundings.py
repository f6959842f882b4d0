"""What rounding to a 16-bit type costs attention: the errors that no kernel with products of that type can avoid.

Such a kernel rounds the weights P, the output, dS and the gradients; everything else is float32. PyTorch in float32
with these roundings has errors of the size that a right kernel has, and for every element their largest size has a
bound. Plain PyTorch in that type is no measure: it also rounds the logits and what follows from them, which at large
logits leaves nothing of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import attention

NAMES = ("out", "dq", "dk", "dv")
FACTOR = 2.0
"""Level D's: how much larger the error may be than that of the roundings alone."""
LOOSEST = 0.1
"""A bound above this share of the true result would prove nothing."""
SINGLE = torch.finfo(torch.float32).eps / 2


class _Terms:
    """Operands and intermediate values, heads first: ``[H, T, D]``, ``[H, L, D]`` and ``[H, T, L]``."""

    def __init__(self, of: attention.Pack, grad: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.q, self.k, self.v, self.grad = (x.to(dtype).transpose(0, 1) for x in (*of[:3], grad))
        self.s = attention.masked_logits(of, dtype)
        self.top = self.s.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
        weights = (self.s - self.top).exp()
        total = weights.sum(-1, keepdim=True)
        self.total = torch.where(total > 0, total, 1.0)
        self.p = weights / self.total
        self.out = self.p @ self.v
        self.dp = self.grad @ self.v.mT
        self.centred = self.dp - (self.grad * self.out).sum(-1, keepdim=True)


def exact(of: attention.Pack, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of q, k and v in float64, heads first."""
    return attention.truth(of)[0].transpose(0, 1), *(
        x.double().transpose(0, 1) for x in attention.gradients(of, grad, attention.truth)
    )


def rounded(of: attention.Pack, grad: Tensor) -> tuple[Tensor, ...]:
    """The same in float32, rounded to the operands' type where a kernel must."""
    t = _Terms(of, grad, torch.float32)

    def half(x: Tensor) -> Tensor:
        return x.to(of.q.dtype).float()

    out = half(half((t.s - t.top).exp()) @ t.v / t.total)
    ds = half(t.p * (t.dp - (t.grad * out).sum(-1, keepdim=True)))
    return out, half(ds @ t.k * of.scale), half(ds.mT @ t.q * of.scale), half(half(t.p).mT @ t.grad)


def bounds(of: attention.Pack, grad: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Largest errors of each element: of rounding to ``dtype`` and of float32 arithmetic, or with None of that alone.

    ``P = exp(s - lse)`` carries the errors of its exponent: a few roundings at the size of logits and lse, and the
    rounding of the row sum where that is a sum of rounded weights. A sum of n terms in any order has an error of at
    most n roundings of the sum of their magnitudes. ``delta`` takes over the errors of the output.
    """
    t = _Terms(of, grad)
    unit = 0.0 if dtype is None else torch.finfo(dtype).eps / 2
    least = 0.0 if dtype is None else torch.finfo(dtype).tiny * unit  # of what is too small for a normal number
    lse = torch.where(t.top > torch.finfo(t.top.dtype).min, (t.total.log() + t.top).abs(), 0.0)
    largest = torch.nan_to_num(t.s, neginf=0.0).abs().amax(-1, keepdim=True) if t.s.shape[-1] else lse
    exponent = 8 * (1 + largest + lse) * SINGLE
    there = (t.s > -torch.inf).double()
    keys, queries = (there.sum(dim, keepdim=True) * SINGLE for dim in (2, 1))
    queries = queries.mT
    out = unit * t.out.abs() + (2 * unit + exponent + keys) * (t.p @ t.v.abs()) + least * (1 + there @ t.v.abs())
    products = t.q.shape[-1] * SINGLE * (t.grad.abs() @ t.v.abs().mT + (t.grad * t.out).abs().sum(-1, keepdim=True))
    centred = products + (t.grad.abs() * out).sum(-1, keepdim=True)
    ds = t.p * (t.centred.abs() * (exponent + 2 * unit) + centred) + least * there
    size = t.p * t.centred.abs()
    dq = of.scale * (ds @ t.k.abs() + keys * (size @ t.k.abs()))
    dk = of.scale * (ds.mT @ t.q.abs() + queries * (size.mT @ t.q.abs()))
    weights = t.p * (exponent + 2 * unit) + least * there
    dv = weights.mT @ t.grad.abs() + queries * (t.p.mT @ t.grad.abs())
    final = (0.0, *(unit * x.abs() + least for x in exact(of, grad)[1:]))
    # Errors of errors: no chain is longer than eight roundings.
    return tuple((1 + 8 * unit) * (x + y) for x, y in zip((out, dq, dk, dv), final, strict=True))


class Roundings:
    """The true results of operands and of a gradient of the output, and the errors that rounding explains."""

    def __init__(self, of: attention.Pack, grad: Tensor) -> None:
        self.keys = of.k.shape[0]
        if self.keys:
            self.true, self.model = exact(of, grad), rounded(of, grad)
            self.most, self.single = bounds(of, grad, of.q.dtype), bounds(of, grad, None)

    def check(self, name: str, found: Tensor) -> None:
        """Assert that the errors of a result ``[T, H, D]`` are of rounding, element by element and in all."""
        if not self.keys:
            assert not bool(found.any()), f"{name}: without keys everything is zero"
            return
        place = NAMES.index(name)
        true, most = self.true[place], self.most[place]
        error = (found.double().transpose(0, 1) - true).abs()
        beyond = ~(error <= most)  # also where it is NaN
        assert not bool(beyond.any()), (
            f"{name}: {int(beyond.sum())} of {error.numel()} elements are further off than roundings explain; "
            f"the first by {error[beyond][0]:.3e}, bound {most[beyond][0]:.3e}"
        )
        bound, size = FACTOR * (self.model[place].double() - true).norm().item(), true.norm().item()
        if size <= (noise := self.single[place].norm().item()):
            bound = noise  # a true result of zero, such as the gradient of q where there is one key
        else:
            assert bound <= LOOSEST * size, f"{name}: the bound {bound:.3e} proves nothing of {size:.3e}"
        assert error.norm().item() <= bound, f"{name}: error {error.norm().item():.3e} in all, bound {bound:.3e}"

"""Inputs for the attention tests, and an independent implementation in float64 without the project's code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .kernels import assert_filled, assert_level_d, poisoned

if TYPE_CHECKING:
    from .attention_roundings import Roundings

TINY = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
TINY_BACKWARD = {"delta": {"BLOCK_M": 32, "num_warps": 4}, "keys": TINY, "queries": TINY}


class Pack(NamedTuple):
    """Operands of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float

    def to(self, device: str) -> Pack:
        """Return the pack on another device, with the same strides."""
        moved = []
        for x in (self.q, self.k, self.v):
            # PyTorch does not keep the stride of a dimension of size 1.
            extra = x.stride(0) - 3 * x.shape[1] * x.shape[2] if x.shape[0] > 1 else 0
            moved.append(_slice(x.to(device), x.dtype, extra))
        return Pack(*moved, self.cu_seqlens_q.to(device), self.cu_seqlens_k.to(device), *self[5:])

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        return self.cu_seqlens_q.diff().tolist(), self.cu_seqlens_k.diff().tolist()


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pack(
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    heads: int = 2,
    head_dim: int = 72,
    dtype: torch.dtype = torch.float32,
    std: float = 1.0,
    seed: int = 0,
    largest_logit: float | None = None,
    rising: bool = False,
    odd: bool = False,
) -> Pack:
    """Draw q, k and v as slices of wider products, each with its own token stride.

    Args:
        largest_logit: q is scaled so that the largest logit of the pack has this size.
        rising: later keys are longer, so that the maximum of a row keeps growing.
        odd: token strides are not multiples of 8.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> Tensor:
        return torch.randn(tokens, heads, head_dim, generator=generator, dtype=torch.float64) * std

    k_lengths = q_lengths if k_lengths is None else k_lengths
    q, k, v = draw(sum(q_lengths)), draw(sum(k_lengths)), draw(sum(k_lengths))
    if rising and k.shape[0] > 0:
        k *= torch.linspace(0.01, 1, k.shape[0], dtype=torch.float64)[:, None, None]
    scale = 1 / math.sqrt(head_dim)
    of = Pack(q, k, v, cumulative(q_lengths), cumulative(k_lengths), max([0, *q_lengths]), max([0, *k_lengths]), scale)
    if largest_logit is not None and (now := logit_size(of)) > 0:
        q *= largest_logit / now
    q, k, v = (_slice(x, dtype, extra + 3 * odd) for x, extra in ((q, 0), (k, 8), (v, 24)))
    return of._replace(q=q, k=k, v=v)


def _slice(x: Tensor, dtype: torch.dtype, extra: int) -> Tensor:
    """Return the same values in the middle of rows more than three times as long, which are NaN elsewhere."""
    width = x.shape[1] * x.shape[2]
    wide = torch.full((x.shape[0], 3 * width + extra), torch.nan, dtype=dtype, device=x.device)
    wide[:, width : 2 * width] = x.flatten(1)
    return wide[:, width : 2 * width].unflatten(1, x.shape[1:])


def gradient_of(of: Pack, seed: int = 9) -> Tensor:
    """Draw a gradient of the output, also a slice with its own stride."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(of.q.shape, generator=generator, dtype=torch.float64)
    return _slice(x.to(of.q.device), of.q.dtype, 40)


def masked_logits(of: Pack, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the logits ``[H, T, L]`` of the whole pack, minus infinity between different members."""
    q_lengths, k_lengths = of.lengths
    s = of.q.to(dtype).transpose(0, 1) @ of.k.to(dtype).permute(1, 2, 0) * of.scale
    members = torch.arange(len(q_lengths), device=s.device)
    rows = members.repeat_interleave(torch.tensor(q_lengths, dtype=torch.int64, device=s.device))
    columns = members.repeat_interleave(torch.tensor(k_lengths, dtype=torch.int64, device=s.device))
    return s.masked_fill(rows[:, None] != columns, -torch.inf)


def logit_size(of: Pack) -> float:
    s = masked_logits(of)
    finite = s[s > -torch.inf]
    return finite.abs().max().item() if finite.numel() else 0.0


def truth(of: Pack) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp in float64, differentiable, as one masked softmax over the whole pack."""
    if of.k.shape[0] == 0:
        nothing = of.q.double() * 0 + (of.k.sum() + of.v.sum())
        return nothing, torch.full(nothing.shape[1::-1], -torch.inf, dtype=torch.float64, device=nothing.device)
    s = masked_logits(of)
    top = s.detach().amax(-1, keepdim=True).clamp(min=-1e300)
    weights = (s - top).exp()
    total = weights.sum(-1, keepdim=True)
    has_keys = total > 0
    total = torch.where(has_keys, total, 1.0)
    out = (weights / total) @ of.v.double().transpose(0, 1)
    return out.transpose(0, 1), torch.where(has_keys, total.log() + top, -torch.inf).squeeze(-1)


def plain(of: Pack) -> Tensor:
    """Return the output in plain PyTorch in the operands' type, with every step rounded to it; differentiable."""
    out = of.q * 0
    row = key = 0
    for rows, keys in zip(*of.lengths, strict=True):
        if rows and keys:
            q, k, v = (
                x.transpose(0, 1) for x in (of.q[row : row + rows], of.k[key : key + keys], of.v[key : key + keys])
            )
            weights = (q @ k.transpose(1, 2) * of.scale).softmax(-1)
            out = out.index_put((torch.arange(row, row + rows, device=q.device),), (weights @ v).transpose(0, 1))
        row, key = row + rows, key + keys
    return out


def gradients(of: Pack, grad: Tensor, function: object = plain) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v, by autograd through ``truth`` or ``plain``."""
    leaves = [x.detach().clone().requires_grad_() for x in (of.q, of.k, of.v)]
    out = function(of._replace(q=leaves[0], k=leaves[1], v=leaves[2]))  # type: ignore[operator]
    out = out[0] if isinstance(out, tuple) else out
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def roundings_of(of: Pack, grad: Tensor) -> Roundings:
    """See :class:`~.attention_roundings.Roundings`, whose module is built on this one."""
    from .attention_roundings import Roundings

    return Roundings(of, grad)


def assert_output(out: Tensor, of: Pack, name: str = "out") -> None:
    """Assert level D for the forward pass, and in 16 bits that the errors are those of rounding."""
    scale = (1 + logit_size(of)) * largest(of.v.double())
    assert_level_d(out, plain(of), truth(of)[0], name, scale=scale)
    if of.q.dtype.itemsize == 2:
        roundings_of(of, torch.zeros_like(out)).check("out", out)


def assert_lse(lse: Tensor, of: Pack) -> None:
    """Assert level D in the type of the computation, plus one rounding to the type of v: where the row sum comes from
    the product with V, it is a sum of rounded weights, and a relative error of a sum is an absolute error of its
    logarithm. Roundings occur at the size of the logits and of the lse: scale, maximum, sum, logarithm, their sum,
    base.
    """
    expected = truth(of)[1]
    assert lse.shape == expected.shape
    empty = expected == -torch.inf
    assert bool((lse[empty] == -torch.inf).all()), "a query without keys has lse minus infinity"
    if bool(empty.all()):
        return
    high, low = (torch.finfo(t).eps / 2 for t in (lse.dtype, of.q.dtype))
    in_type = masked_logits(of, lse.dtype).logsumexp(-1).double()
    of_plain = (in_type - expected)[~empty].abs().max().item()
    bound = 2 * of_plain + 8 * high * (1 + logit_size(of) + largest(expected[~empty])) + low
    error = (lse.double() - expected)[~empty].abs().max().item()
    assert error <= bound, f"lse: error {error:.3e}, bound {bound:.3e}"


def assert_gradients(found: Sequence[Tensor], of: Pack, grad: Tensor) -> None:
    """Assert level D for the backward pass, and in 16 bits that the errors are those of rounding.

    Roundings affect the terms of the sums over queries or keys: P dO for dV, and for dQ and dK ``scale P (dP - delta)``
    times a key or a query. ``P = exp(s - lse)`` carries the error of its exponent; an inner product such as dP has an
    error relative to the sum of its terms' magnitudes.
    """
    expected, in_type = gradients(of, grad, truth), gradients(of, grad)
    share = torch.nan_to_num(masked_logits(of).softmax(-1)) if of.k.shape[0] else masked_logits(of)
    queries_per_key = share.sum(1).max().item() if share.numel() else 0.0  # largest sum of P over queries
    dp = 2 * largest(grad.double().abs().transpose(0, 1) @ of.v.double().abs().permute(1, 2, 0)) * of.scale
    lse = truth(of)[1]
    error = 1 + logit_size(of) + largest(lse[lse > -torch.inf])
    scales = (
        error * dp * largest(of.k.double()),
        error * dp * largest(of.q.double()) * queries_per_key,
        error * largest(grad.double()) * queries_per_key,
    )
    roundings = roundings_of(of, grad) if of.q.dtype.itemsize == 2 else None
    for name, got, a, b, scale in zip(("dq", "dk", "dv"), found, in_type, expected, scales, strict=True):
        assert_level_d(got, a, b.double(), name, scale=scale)
        if roundings:
            roundings.check(name, got)


def run(of: Pack, config: dict[str, int] | None = None, multiple_of: int = 1) -> tuple[Tensor, Tensor]:
    """Run the forward kernel into poisoned outputs; return output and log-sum-exp."""
    from pixelflow_kernels.varlen_attention.forward import launch_forward

    tokens, heads, head_dim = of.q.shape
    out = poisoned(tokens, heads * head_dim, dtype=of.q.dtype, device=of.q.device)
    lse = poisoned(heads, tokens, dtype=torch.promote_types(of.q.dtype, torch.float32), device=of.q.device)
    operands = (of.q, of.k, of.v, of.cu_seqlens_q, of.cu_seqlens_k)
    view = out.out.unflatten(1, (heads, head_dim))
    launch_forward(*operands, view, lse.out, of.max_seqlen_q, of.scale, multiple_of, config)
    assert_filled(*out)
    assert_filled(*lse, "lse")
    return view, lse.out


def run_backward(
    of: Pack,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    configs: dict[str, dict[str, int]] | None = None,
    multiple_of: int = 1,
) -> list[Tensor]:
    """Run the backward kernels into poisoned gradients; return those of q, k and v."""
    from pixelflow_kernels.varlen_attention.backward import launch_backward

    shape = of.q.shape[1:]
    found = [
        poisoned(x.shape[0], shape.numel(), dtype=x.dtype, device=x.device, guard=8 * i)
        for i, x in enumerate(of[:3], start=2)
    ]
    views = [x.out.unflatten(1, shape) for x in found]
    launch_backward(
        grad, None, of.q, of.k, of.v, out, lse, of.cu_seqlens_q, of.cu_seqlens_k, *views,
        of.max_seqlen_q, of.max_seqlen_k, of.scale, multiple_of, configs,
    )  # fmt: skip
    for name, x in zip(("dq", "dk", "dv"), found, strict=True):
        assert_filled(*x, name)
    return views


def check(
    of: Pack,
    config: dict[str, int] | None = None,
    configs: dict[str, dict[str, int]] | None = None,
    multiple_of: int = 1,
) -> None:
    """Assert level D of the kernels, forward and backward, with the given or the frozen configurations."""
    out, lse = run(of, config, multiple_of)
    assert_output(out, of)
    assert_lse(lse, of)
    grad = gradient_of(of)
    assert_gradients(run_backward(of, grad, out, lse, configs, multiple_of), of, grad)

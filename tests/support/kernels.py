"""Helpers for all kernel tests: poisoned outputs with red zones, hostile inputs, bit comparison, the level D bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

GUARD = 64  # poisoned elements on either side of every row of an output
INPUT_GUARD = 32  # for an input: other row strides than an output's, so that confusing the two strides is detected

# A NaN that no arithmetic produces (by its payload), so that a NaN written by a kernel differs from an unwritten one.
POISON = {
    torch.bfloat16: (torch.int16, 0x7FDB),
    torch.float16: (torch.int16, 0x7EDB),
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.float64: (torch.int64, 0x7FF8DEADDEADDEAD),
    torch.uint8: (torch.uint8, 0xDB),
    torch.int32: (torch.int32, 0x5EADDEAD),
    torch.int64: (torch.int64, 0x5EADDEAD5EADDEAD),
}


class Poisoned(NamedTuple):
    """``out`` is a view into the middle of ``buffer``; both are all poison until something is written."""

    buffer: Tensor
    out: Tensor


def poisoned(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    dense: bool = False,
    guard: int = GUARD,
) -> Poisoned:
    """Return an output of any shape inside a buffer of poison, with red zones before and after it.

    Args:
        shape: shape of the output, at least one dimension.
        dense: whether the output is contiguous, with red zones only before its first and after its last element.
            Otherwise every row (the last dimension) has red zones of its own, and there is one more row at either end
            of the first dimension; the last dimension has stride 1, so rows are further apart than they are long.
        guard: number of elements in a red zone.
    """
    integer, bits = POISON[dtype]
    if dense or len(shape) == 1:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * guard,), bits, dtype=integer, device=device).view(dtype)
        return Poisoned(buffer, buffer[guard : guard + size].view(shape))
    wide = (shape[0] + 2, *shape[1:-1], shape[-1] + 2 * guard)
    buffer = torch.full(wide, bits, dtype=integer, device=device).view(dtype)
    return Poisoned(buffer, buffer[1:-1, ..., guard:-guard])


def poisoned_like(x: Tensor, *, dense: bool = False) -> Poisoned:
    """Return an output with the shape, type and device of ``x``."""
    return poisoned(*x.shape, dtype=x.dtype, device=x.device, dense=dense)


def surrounded(x: Tensor, *, dense: bool = False) -> Tensor:
    """Return ``x`` surrounded by NaN in the layout of :func:`poisoned`, so that reads outside of it show."""
    view = poisoned(*x.shape, dtype=x.dtype, device=x.device, dense=dense, guard=INPUT_GUARD).out
    view.copy_(x)
    return view.detach()


def random_bits(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw values of every kind and size: random bits, which include NaN, infinities and denormals.

    A few per cent are special values chosen on purpose, because a zero practically never occurs among random bits.
    """
    integer = POISON[dtype][0]
    info = torch.iinfo(integer)
    drawn = torch.randint(info.min, info.max, shape, dtype=integer, generator=generator, device=generator.device)
    limits = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        limits.max,
        limits.min,
        limits.tiny,
        limits.smallest_normal / 8,
    ]
    values = torch.tensor([*special, 1.0, -1.0], dtype=dtype, device=generator.device)
    which = torch.randint(20 * len(values), shape, generator=generator, device=generator.device)
    # All NaNs become the same one: arithmetic propagates a NaN's bits, and these might be those of the poison.
    return torch.where(
        which < len(values),
        values[which.clamp(max=len(values) - 1)],
        drawn.view(dtype).nan_to_num_(torch.nan, torch.inf, -torch.inf),
    )


def assert_filled(buffer: Tensor, out: Tensor, name: str = "out") -> None:
    """Assert that every element of ``out`` was written (NaN counts), and nothing else in its buffer."""
    integer, bits = POISON[out.dtype]
    unwritten = int((out.contiguous().view(integer) == bits).sum())
    assert unwritten == 0, f"{name}: {unwritten} of {out.numel()} elements left unwritten"
    touched = buffer.numel() - out.numel() - int((buffer.view(integer) == bits).sum())
    assert touched == 0, f"{name}: {touched} elements written outside of it"


def assert_untouched(buffer: Tensor, name: str = "out") -> None:
    """Assert that nothing was written."""
    integer, bits = POISON[buffer.dtype]
    touched = int((buffer.view(integer) != bits).sum())
    assert touched == 0, f"{name}: {touched} elements written"


def differing_bits(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of equal type and shape differ: signed zeros differ, NaN equals any other NaN."""
    assert a.dtype == b.dtype, f"{a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.contiguous().view(integer) != b.contiguous().view(integer)
    return differ & ~(a.isnan() & b.isnan()) if a.is_floating_point() else differ


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether no bit differs (see :func:`differing_bits`)."""
    return not bool(differing_bits(a, b).any())


def assert_same_bits(a: Tensor, b: Tensor, name: str = "out") -> None:
    """Assert that no bit differs; the message says how many values differ and shows the first."""
    differ = differing_bits(a, b)
    if differ.any():
        place = differ.nonzero()[0].tolist()
        got, expected = a[tuple(place)].item(), b[tuple(place)].item()
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {a.numel()} differ; at {place}: {got!r}, not {expected!r}"
        )


def assert_level_d(out: Tensor, plain: Tensor, truth: Tensor, name: str = "out", scale: float | None = None) -> None:
    """Assert that the error is at most twice that of plain PyTorch in the same type, plus two roundings at ``scale``.

    Args:
        out: the kernel's result.
        plain: the same computation in plain PyTorch, in the same type.
        truth: the same computation in float64, from the same inputs.
        scale: size of the values that are rounded; for attention ``(1 + max|logit|) max|v|``. By default the largest
            true value.
    """
    assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    assert plain.dtype == out.dtype, f"{name}: {out.dtype} against plain {plain.dtype}"
    unit = torch.finfo(out.dtype).eps / 2
    scale = truth.abs().max().item() if scale is None else scale
    of_plain = (plain.double() - truth).abs().max().item()
    error = (out.double() - truth).abs().max().item()
    bound = 2 * of_plain + 2 * unit * scale
    # A NaN anywhere makes the comparison false.
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e} (plain {of_plain:.3e}, scale {scale:.3g})"


def plain(operation: CustomOpDef) -> Callable[..., Any]:
    """Return an operation's plain implementation, even where a call would run the kernels under the interpreter."""
    return operation._init_fn

"""What the tests of every kernel need: poisoned outputs with red zones, hostile inputs, bits, the level D bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

GUARD = 64  # poisoned elements on either side of every row of an output
INPUT_GUARD = (
    32  # of an input: its rows must not be as far apart as an output's, or a stride taken for the other passes
)

# A NaN that no arithmetic yields (its payload is ours), so that a NaN that a kernel wrote is told from one it left.
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
    """``out`` is a view in the middle of ``buffer``; all of both is poison until somebody writes."""

    buffer: Tensor
    out: Tensor


def poisoned(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    dense: bool = False,
    guard: int = GUARD,
) -> Poisoned:
    """An output of any shape in a buffer of poison, with red zones before and after it.

    Args:
        shape: of the output, at least one dimension.
        dense: the output is contiguous, with a red zone before its first and after its last element only. Otherwise
            every row (the last dimension) has red zones of its own, and there is a row more at either end of the first
            dimension; the last dimension has stride 1, so the rows are further apart than they are long.
        guard: elements of a red zone.
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
    """An output with the shape, type and device of ``x``."""
    return poisoned(*x.shape, dtype=x.dtype, device=x.device, dense=dense)


def surrounded(x: Tensor, *, dense: bool = False) -> Tensor:
    """The values of ``x`` in the middle of NaN, laid out as :func:`poisoned` does: what is read outside shows."""
    view = poisoned(*x.shape, dtype=x.dtype, device=x.device, dense=dense, guard=INPUT_GUARD).out
    view.copy_(x)
    return view.detach()


def random_bits(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of every kind and size: any bits at all, so also NaN, infinities, denormals and both zeros.

    A few per cent are those special values on purpose: among random bits a zero never comes.
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
    # One NaN is as good as another, except that arithmetic hands on its bits, and they might be the poison's.
    return torch.where(
        which < len(values),
        values[which.clamp(max=len(values) - 1)],
        drawn.view(dtype).nan_to_num_(torch.nan, torch.inf, -torch.inf),
    )


def assert_filled(buffer: Tensor, out: Tensor, name: str = "out") -> None:
    """Every element of ``out`` was written (NaN counts), and nothing else of its buffer was."""
    integer, bits = POISON[out.dtype]
    unwritten = int((out.contiguous().view(integer) == bits).sum())
    assert unwritten == 0, f"{name}: {unwritten} of {out.numel()} elements left unwritten"
    touched = buffer.numel() - out.numel() - int((buffer.view(integer) == bits).sum())
    assert touched == 0, f"{name}: {touched} elements written outside of it"


def assert_untouched(buffer: Tensor, name: str = "out") -> None:
    """Nothing at all was written."""
    integer, bits = POISON[buffer.dtype]
    touched = int((buffer.view(integer) != bits).sum())
    assert touched == 0, f"{name}: {touched} elements written"


def differing_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one type and shape differ: signed zeros are told apart, NaN equals any other NaN."""
    assert a.dtype == b.dtype, f"{a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.contiguous().view(integer) != b.contiguous().view(integer)
    return differ & ~(a.isnan() & b.isnan()) if a.is_floating_point() else differ


def same_bits(a: Tensor, b: Tensor) -> bool:
    """No differing bit (see :func:`differing_bits`)."""
    return not bool(differing_bits(a, b).any())


def assert_same_bits(a: Tensor, b: Tensor, name: str = "out") -> None:
    """No differing bit; says how many values differ and shows the first."""
    differ = differing_bits(a, b)
    if differ.any():
        place = differ.nonzero()[0].tolist()
        got, expected = a[tuple(place)].item(), b[tuple(place)].item()
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {a.numel()} differ; at {place}: {got!r}, not {expected!r}"
        )


def assert_level_d(out: Tensor, plain: Tensor, truth: Tensor, name: str = "out", scale: float | None = None) -> None:
    """No further from float64 than twice plain PyTorch of the same type, plus two roundings at ``scale``.

    Args:
        out: what the kernel computed.
        plain: the same computation in plain PyTorch, in the same type.
        truth: in float64, from the same inputs.
        scale: size of the values that are rounded; for attention ``(1 + max|logit|) max|v|``. The largest true value
            where it is not given.
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
    """An operation's plain implementation, also where Triton interprets and a call would run the kernels."""
    return operation._init_fn

"""Inputs for the rope2d tests, and the same mathematics written a second time, in float64 and without our code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout

GUARD = 64  # poisoned elements on either side of an output's tokens
GRIDS: dict[str, list[tuple[int, int]]] = {
    "ragged": [(1, 1), (3, 2), (1, 5), (6, 4), (2, 4)],
    "one token": [(1, 1)],
    "empty": [],
}


def turn(x: Tensor, layout: PackedLayout) -> Tensor:
    """2-D RoPE of ``x [T, H, D]`` by complex multiplication in float64."""
    quarter = x.shape[-1] // 4
    theta = torch.tensor([10000.0 ** (-2 * j / (2 * quarter)) for j in range(quarter)], dtype=torch.float64)
    angle = torch.cat([layout.column.double()[:, None] * theta, layout.row.double()[:, None] * theta], dim=-1)
    pairs = torch.view_as_complex(x.double().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)


def norm(x: Tensor, weight: Tensor, num_heads: int, eps: float = 1e-6) -> Tensor:
    """RMSNorm of ``x [T, C]`` in float64, split into heads."""
    high = x.double()
    length = torch.linalg.vector_norm(high, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    length = torch.hypot(length, torch.tensor(math.sqrt(eps), dtype=torch.float64))
    return (high / length * weight.double()).unflatten(-1, (num_heads, -1))


def fused_qkv(tokens: int, width: int, dtype: torch.dtype, std: float, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k and v as slices of one product ``[T, 3C]``."""
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(tokens, 3 * width, generator=generator, dtype=torch.float64) * std
    return product.to(dtype).chunk(3, dim=-1)


def weights(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    q_weight, k_weight = 1 + 0.3 * torch.randn(2, width, generator=generator, dtype=torch.float64)
    return q_weight.to(dtype), k_weight.to(dtype)


def poisoned(tokens: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A NaN-filled buffer and the view ``[T, C]`` in its middle, whose rows have red zones on both sides too."""
    buffer = torch.full((tokens + 2, width + 2 * GUARD), torch.nan, dtype=dtype, device=device)
    return buffer, buffer[1:-1, GUARD:-GUARD]


def assert_filled(buffer: Tensor, out: Tensor) -> None:
    """Every element of ``out`` was written, and nothing else of its buffer was."""
    assert not out.isnan().any(), "output left unwritten"
    assert int(buffer.isnan().sum()) == buffer.numel() - out.numel(), "written outside the output"


def assert_level_d(out: Tensor, plain: Tensor, truth: Tensor, name: str = "out") -> None:
    """No further from float64 than twice plain PyTorch of the same type, plus two roundings of the largest value."""
    if truth.numel() == 0:
        return
    unit = torch.finfo(out.dtype).eps / 2
    error = (out.double() - truth).abs().max().item()
    bound = 2 * (plain.double() - truth).abs().max().item() + 2 * unit * truth.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit equal, signed zeros told apart, any NaN equal to any other."""
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(as_integer) == b.contiguous().view(as_integer)
    return a.dtype == b.dtype and a.shape == b.shape and bool((equal | (a.isnan() & b.isnan())).all())


def layout_of(grids: Sequence[tuple[int, int]], device: str = "cpu") -> PackedLayout:
    return PackedLayout.from_grids(grids, device=device)

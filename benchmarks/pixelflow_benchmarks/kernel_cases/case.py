"""A benchmark case: one computation, several implementations of it, and what proves each right.

A stage's sizes are those of the published class-to-image model (256 px, patch 4, width 1152, 16 heads of 72).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout

WIDTH, HEADS, HEAD_DIM, PATCH_CHANNELS = 1152, 16, 72, 48
STAGE_SIDES = (8, 16, 32, 64)
"""Tokens along a side of an image at each stage."""

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What a case is made for.

    Attributes:
        stage: of the cascade, 0 to 3.
        batch: images; with guidance a model sees twice as many.
        dtype: of tokens and velocities.
        device: where.
    """

    stage: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def label(self) -> str:
        """As it stands in a case's name."""
        return f"stage{self.stage}-b{self.batch}"

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return STAGE_SIDES[self.stage]

    def layout(self, guided: bool = True) -> PackedLayout:
        """The pack that a model sees: both halves of the batch with guidance."""
        return PackedLayout.from_grids([(self.side, self.side)] * self.batch * (1 + guided), self.device)

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normals in ``dtype``, the problem's where it is not given."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors' values."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """``torch.compile`` of one graph for one shape."""
    call: Callable[..., Outputs] = torch.compile(function, fullgraph=True, dynamic=False)
    return call


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation on one shape.

    Attributes:
        name: ``"op.kernel/shape"``, unique.
        variants: implementations by name; ``ours`` is the kernel. Each returns the same tuple of tensors.
        absent: implementations that cannot run here, and why.
        plain: the computation in plain PyTorch, in the same type: what level D compares with.
        truth: the same from the same inputs in float64.
        exact: the level A outputs: ``ours`` must have the bits of ``plain``.
        scale: size of the values that are rounded, for level D; None for the largest true value.
        bytes_moved: read and written at least, each tensor once.
        flops: of matrix products; 0 for what is bound by memory.
    """

    name: str
    variants: Mapping[str, Callable[[], Outputs]]
    absent: Mapping[str, str] = field(default_factory=dict)
    plain: Callable[[], Outputs]
    truth: Callable[[], Outputs] | None = None
    exact: bool = False
    scale: float | None = None
    bytes_moved: int
    flops: int = 0


def faults(case: Case, name: str) -> list[str]:
    """What is wrong with the outputs of a variant; nothing where they are right.

    Level A cases: ``ours`` equals ``plain`` in every bit. Otherwise level D: no further from float64 than twice plain
    PyTorch of the same type plus two roundings.
    """
    got, plain = case.variants[name](), case.plain()
    if len(got) != len(plain):
        return [f"{len(got)} outputs, expected {len(plain)}"]
    found = []
    truth = case.truth() if case.truth is not None else tuple(p.double() for p in plain)
    for i, (a, b, c) in enumerate(zip(got, plain, truth, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"output {i}: {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}")
        elif case.exact and name == "ours":
            if not torch.equal(a, b):
                found.append(f"output {i}: {int((a != b).sum())} of {a.numel()} values differ from plain PyTorch")
        elif a.numel() > 0:
            error, bound = level_d(a, b, c, case.scale)
            if not error <= bound:
                found.append(f"output {i}: error {error:.3e}, bound {bound:.3e}")
    return found


def level_d(out: Tensor, plain: Tensor, truth: Tensor, scale: float | None) -> tuple[float, float]:
    """Largest error against float64, and what level D allows."""
    unit = torch.finfo(out.dtype).eps / 2
    size = truth.abs().max().item() if scale is None else scale
    bound = 2 * (plain.double() - truth).abs().max().item() + 2 * unit * size
    return (out.double() - truth).abs().max().item(), bound

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

LOOSEST = 0.1
"""Of a row's largest value; in bfloat16 level D comes to some 0.03."""

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
        growth: roundings at the size of a row's largest true value that level D grants twice (see :func:`level_d`); one
            number, or one for each output.
        bytes_moved: read and written at least, each tensor once in each direction. Left out are numbers per image
            (lengths, steps, seeds, intervals) and attention's log-sum-exp, which not everybody keeps.
        flops: of matrix products, a multiplication and an addition being two; attention's backward pass computes its
            scores again. 0 for what is bound by memory.
    """

    name: str
    variants: Mapping[str, Callable[[], Outputs]]
    absent: Mapping[str, str] = field(default_factory=dict)
    plain: Callable[[], Outputs]
    truth: Callable[[], Outputs] | None = None
    exact: bool = False
    growth: float | tuple[float, ...] = 1.0
    bytes_moved: int
    flops: int = 0


def faults(case: Case) -> dict[str, list[str]]:
    """What is wrong with the outputs of each variant; nothing where they are right.

    Level A cases: ``ours`` equals ``plain`` in every bit. Otherwise :func:`level_d`.
    """
    plain = case.plain()
    truth = case.truth() if case.truth is not None else tuple(p.double() for p in plain)
    found = {}
    for name, call in case.variants.items():
        got = call()
        if len(got) != len(plain):
            found[name] = [f"{len(got)} outputs, expected {len(plain)}"]
            continue
        growth = case.growth if isinstance(case.growth, tuple) else (case.growth,) * len(plain)
        said = (_fault(case, name, *of) for of in zip(got, plain, truth, growth, strict=True))
        found[name] = [f"output {i}: {what}" for i, what in enumerate(said) if what]
    return found


def _fault(case: Case, name: str, out: Tensor, plain: Tensor, truth: Tensor, growth: float) -> str | None:
    if out.shape != plain.shape or out.dtype != plain.dtype:
        return f"{out.dtype} {tuple(out.shape)}, expected {plain.dtype} {tuple(plain.shape)}"
    if case.exact and name == "ours":
        differing = int((out != plain).sum())
        return f"{differing} of {out.numel()} values differ from plain PyTorch" if differing else None
    return level_d(out, plain, truth, growth) if out.numel() > 0 else None


def level_d(out: Tensor, plain: Tensor, truth: Tensor, growth: float = 1.0) -> str | None:
    """What is wrong by level D: further from float64 than twice plain PyTorch of the same type plus two roundings.

    Errors are relative to the largest true value of their row, the last dimension: one row that is wrong is not
    measured by what others are. What plain PyTorch is granted is its largest such error. A bound that a tenth of a row
    would pass proves nothing, and is a fault, too.

    It is for rows that do not come out of cancellation, as a query's gradient does where one key has nearly all of its
    weight: with 64 keys or more of normal logits none does.

    Args:
        out: what is looked at.
        plain: the same computation in plain PyTorch, in the same type.
        truth: in float64, from the same inputs.
        growth: how much larger than a row's largest true value what is rounded on the way to it may be.
    """
    size = truth.abs().amax(-1).clamp_(min=torch.finfo(truth.dtype).tiny)
    # One difference in float64 lives at a time: at the last stage of 16 guided images it is 1.2 GB.
    error, of_plain = (((x - truth).abs_().amax(-1) / size).max().item() for x in (out, plain))
    bound = 2 * of_plain + torch.finfo(out.dtype).eps * growth  # an eps is two roundings
    if not bound <= LOOSEST:
        return f"a bound of {bound:.1e} of a row's largest value would prove nothing"
    return None if error <= bound else f"error {error:.3e} of a row's largest value, bound {bound:.3e}"

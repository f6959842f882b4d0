"""Benchmark cases: one computation, several implementations of it, and the checks that each must pass.

Sizes of a stage are those of the published class-to-image model (256 px, patch 4, width 1152, 16 heads of 72).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_kernels import PackedLayout

WIDTH, HEADS, HEAD_DIM, PATCH_CHANNELS = 1152, 16, 72, 48
STAGE_SIDES = (8, 16, 32, 64)
"""Tokens along a side of an image at each stage."""

LOOSEST = 0.1
"""Largest bound that is accepted, relative to a row's largest value; in bfloat16 level D's bound is about 0.03."""

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """The sizes, dtype and device for which cases are made.

    Attributes:
        stage: stage of the cascade, 0 to 3.
        batch: number of images; with guidance a model sees twice as many sequences.
        dtype: type of tokens and velocities.
        device: device to run on.
    """

    stage: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def label(self) -> str:
        """The part of a case's name that describes the problem."""
        return f"stage{self.stage}-b{self.batch}"

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return STAGE_SIDES[self.stage]

    def layout(self, guided: bool = True) -> PackedLayout:
        """Return the layout of the pack that a model sees: with guidance, both halves of the batch."""
        return PackedLayout.from_grids([(self.side, self.side)] * self.batch * (1 + guided), self.device)

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw standard normals in ``dtype``, by default the problem's."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)


def size_of(*tensors: Tensor | None) -> int:
    """Return the number of bytes of all values of the tensors; None counts as nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Compile a function by ``torch.compile``, as a single graph with static shapes."""
    call: Callable[..., Outputs] = torch.compile(function, fullgraph=True, dynamic=False)
    return call


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation on one shape.

    Attributes:
        name: ``"op.kernel/shape"``, unique.
        variants: implementations by name; ``ours`` is the kernel. All return the same tuple of tensors.
        absent: implementations that cannot run here, with the reason.
        plain: the computation in plain PyTorch, in the same types: the yardstick of level D.
        truth: the same computation from the same inputs in float64; None converts the outputs of ``plain``.
        exact: whether the case is level A: ``ours`` must have the bits of ``plain``.
        growth: factor on the two roundings that level D grants (see :func:`level_d`); one number, or one per output.
        bytes_moved: bytes that must at least be read and written, each tensor once per direction. Left out are values
            per image (lengths, steps, seeds, intervals) and attention's log-sum-exp, which not every implementation
            stores.
        flops: floating-point operations of matrix products, a multiplication and an addition being two; attention's
            backward pass recomputes its scores. 0 for kernels bound by memory.
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
    """Return what is wrong with the outputs of each variant: an empty list if they are right.

    In level A cases ``ours`` must equal ``plain`` in every bit. All others must pass :func:`level_d`. An error is the
    fault of the variant that raised it, and of all variants if it was raised by ``plain`` or ``truth``.
    """
    try:
        plain = case.plain()
        truth = case.truth() if case.truth is not None else tuple(p.double() for p in plain)
    except Exception as error:  # the other cases are still measured
        return {name: [f"nothing to compare with: {first_line(error)}"] for name in case.variants}
    found = {}
    for name, call in case.variants.items():
        try:
            found[name] = _faults_of(case, name, call(), plain, truth)
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            found[name] = [first_line(error)]
    return found


def _faults_of(case: Case, name: str, got: Outputs, plain: Outputs, truth: Outputs) -> list[str]:
    if len(got) != len(plain):
        return [f"{len(got)} outputs, expected {len(plain)}"]
    growth = case.growth if isinstance(case.growth, tuple) else (case.growth,) * len(plain)
    said = (_fault(case, name, *of) for of in zip(got, plain, truth, growth, strict=True))
    return [f"output {i}: {what}" for i, what in enumerate(said) if what]


def _fault(case: Case, name: str, out: Tensor, plain: Tensor, truth: Tensor, growth: float) -> str | None:
    if out.shape != plain.shape or out.dtype != plain.dtype:
        return f"{out.dtype} {tuple(out.shape)}, expected {plain.dtype} {tuple(plain.shape)}"
    if case.exact and name == "ours":
        differing = int((out != plain).sum())
        return f"{differing} of {out.numel()} values differ from plain PyTorch" if differing else None
    return level_d(out, plain, truth, growth) if out.numel() > 0 else None


def level_d(out: Tensor, plain: Tensor, truth: Tensor, growth: float = 1.0) -> str | None:
    """Check level D: at most twice as far from float64 as plain PyTorch in the same type, plus two roundings.

    Errors are relative to the largest true value of their row (the last dimension), so that an error in a row of small
    values is not hidden by larger rows. The error of plain PyTorch is its largest over all rows. A bound above
    :data:`LOOSEST` (a tenth of a row's largest value) would prove nothing and is a fault too.

    The check is meant for rows that are not the result of cancellation, as a query's gradient is if one key has nearly
    all of the weight: with 64 or more keys and normal logits this does not happen.

    Args:
        out: the output to check.
        plain: the output of the same computation in plain PyTorch, in the same type.
        truth: the output in float64, from the same inputs.
        growth: factor on the two roundings: how much larger than a row's largest true value the intermediate values
            that are rounded may be.

    Returns:
        What is wrong, or None.
    """
    size = truth.abs().amax(-1).clamp_(min=torch.finfo(truth.dtype).tiny)
    # Only one difference in float64 exists at a time: at the last stage with 16 guided images it takes 1.2 GB.
    error, of_plain = (((x - truth).abs_().amax(-1) / size).max().item() for x in (out, plain))
    bound = 2 * of_plain + torch.finfo(out.dtype).eps * growth  # an eps is two roundings
    if not bound <= LOOSEST:
        return f"a bound of {bound:.1e} of a row's largest value would prove nothing"
    return None if error <= bound else f"error {error:.3e} of a row's largest value, bound {bound:.3e}"

"""Every kernel against plain PyTorch: the cases of ``pixelflow bench kernels``.

Calls are timed as a program makes them, with warm caches and including the launch, whereas ``bench kernels`` flushes
the cache and replays graphs.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.commands.options import place_of
from pixelflow_benchmarks.suites.kernels.case import Case, Problem, faults
from pixelflow_benchmarks.suites.kernels.cases import OPS, STAGE_SIDES

ALL = ("ours", "eager", "torch.compile")
BOTH = ("ours", "eager")
ATTENTION = ("ours", "eager", "SDPA (cuDNN)", "SDPA (flash)", "FlashAttention")

VARIANTS = {
    "varlen_attention.forward": ATTENTION,
    "varlen_attention.forward+backward": ATTENTION,
    "modulate.rms_residual.forward": ALL,
    "modulate.rms_residual.forward+backward": BOTH,
    "modulate.layer_residual.forward": ALL,
    "modulate.layer_residual.forward+backward": BOTH,
    "modulate.layer.forward": ALL,
    "modulate.layer.forward+backward": BOTH,
    "rope2d.forward": ALL,
    "rope2d.forward+backward": BOTH,
    "rope2d.rotate": BOTH,
    "ode_step.euler": ALL,
    "ode_step.stage": ALL,
    "ode_step.error": ALL,
    "cascade.draw_renoise": BOTH,
    "cascade.renoise": BOTH,
    "cascade.training_pairs": BOTH,
    "adamw.update": ("ours", "eager", "torch fused"),
}
"""Variants by kernel, listed so that collecting the tests creates no tensors."""

DEVICE = place_of("auto")
ON_GPU = DEVICE.type == "cuda"
BATCH, DTYPE = (16, torch.bfloat16) if ON_GPU else (1, torch.float32)


def stages_of(kernel: str) -> list[int]:
    """Return the stages for which a kernel has a case, the largest first; on a CPU only its smallest."""
    last = len(STAGE_SIDES) - 1
    first = {"cascade.draw_renoise": 1, "cascade.renoise": 1, "cascade.training_pairs": last, "adamw.update": last}.get(
        kernel, 0
    )
    return [*range(last, first - 1, -1)] if ON_GPU else [first]


def cases() -> Iterator[Any]:
    """Yield kernel, stage and variant, the most important first; the variants of a case are adjacent."""
    for op in OPS:
        for kernel in (name for name in VARIANTS if name.startswith(f"{op}.")):
            for stage in stages_of(kernel):
                for variant in VARIANTS[kernel]:
                    yield pytest.param(kernel, stage, variant, id=f"{kernel}/stage{stage}-b{BATCH}-{variant}")


@dataclass
class Current:
    """The one case whose tensors are in memory, with the results that its variants are checked against."""

    name: str = ""
    case: Case | None = None

    def get(self, kernel: str, stage: int) -> Case:
        """Return the case, making it and dropping the previous one if it is another."""
        problem = Problem(stage, BATCH, DTYPE, DEVICE)
        name = f"{kernel}/{problem.label}"
        if self.case is None or self.name != name:
            self.case = None
            gc.collect()
            module = importlib.import_module(f"pixelflow_benchmarks.suites.kernels.{kernel.partition('.')[0]}")
            case = next(found for found in module.cases(problem) if found.name == name)
            plain, truth = case.plain(), None if case.truth is None else case.truth()
            self.case = replace(case, plain=lambda: plain, truth=None if truth is None else lambda: truth)
            self.name = name
        return self.case


@pytest.fixture(scope="module")
def current() -> Current:
    """See :class:`Current`."""
    return Current()


@pytest.mark.parametrize(("kernel", "stage", "variant"), [*cases()])
def test_kernel(kernel: str, stage: int, variant: str, current: Current, time_right: Any) -> None:
    """Time one variant of one case."""
    case = current.get(kernel, stage)
    if variant in case.absent:
        pytest.skip(f"{variant}: {case.absent[variant]}")
    call = case.variants[variant]
    found = faults(replace(case, variants={variant: call}))[variant]
    time_right(case.name, variant, call, found, bytes=case.bytes_moved, flops=case.flops)

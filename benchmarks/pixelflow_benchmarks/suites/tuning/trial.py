"""One kernel on one problem, to be launched with any configuration, and what proves a launch right."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from pixelflow_benchmarks.suites.kernels.case import Outputs

from .spaces import Config


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One kernel on one problem.

    Attributes:
        problem: its name, ``"stage3-b16"``; unique for the kernel.
        shape_class: under which configurations for it are kept.
        present: the frozen configuration.
        launch: runs the kernel; returns all that it writes. It may be called any number of times.
        buffers: outputs that ``launch`` is to fill, not allocated by itself; they are poisoned before a check.
        exact: places among the outputs that are level A: every configuration gives them the same bits.
        plain: all outputs in plain PyTorch, in the same types; None where all are exact.
        truth: the same in float64.
        growth: how much larger than a row's largest true value what is rounded on the way to it may be, for level D.
        jit: the kernel under ``@triton.jit``, for what its compiled variants take.
    """

    problem: str
    shape_class: str
    present: Config
    launch: Callable[[Config], Outputs]
    buffers: Outputs
    exact: Collection[int] = ()
    plain: Callable[[], Outputs] | None = None
    truth: Callable[[], Outputs] | None = None
    growth: float = 1.0
    jit: Any = field(default=None, repr=False)

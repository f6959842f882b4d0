"""One kernel on one problem, which can be launched with any configuration, and what its outputs are checked against."""

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
        problem: name of the problem, ``"stage3-b16"``; unique for the kernel.
        shape_class: shape class under which its configuration is stored.
        present: the frozen configuration.
        launch: runs the kernel with a configuration and returns all outputs; it may be called any number of times.
        buffers: outputs that ``launch`` fills but does not allocate; they are set to NaN before a check.
        exact: indices of the outputs that are level A: every configuration gives them the same bits.
        plain: computes all outputs in plain PyTorch, in the same types; None if all are exact.
        truth: computes the same in float64; None if all are exact.
        growth: factor on level D's two roundings, see :func:`~pixelflow_benchmarks.suites.kernels.case.level_d`.
        jit: the function under ``@triton.jit``, from which registers and spills are read.
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

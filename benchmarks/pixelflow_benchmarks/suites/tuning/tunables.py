"""What ``pixelflow bench tune`` tunes: the candidates of each kernel, and the problems that decide between them.

The module of an operation has a function ``trials(kernel, problem)``; a kernel's shape classes are those of its
problems.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pixelflow_benchmarks.suites.kernels.case import STAGE_SIDES, Problem

from .spaces import SPACES, Config
from .trial import Trial

__all__ = ["KERNELS", "OPERATIONS", "STAGE_SIDES", "Config", "Trial", "Tunable", "tunables"]

KERNELS = tuple(SPACES)
"""Most important first, so that an interrupted run has tuned what matters most."""

OPERATIONS = tuple(dict.fromkeys(kernel.split(".")[0] for kernel in KERNELS))
"""The operations that these kernels are of."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """A kernel to tune.

    Attributes:
        kernel: name in the configuration tables, ``"rope2d.forward"``.
        space: configurations to try in addition to the present ones.
        trials: makes the trials, the largest problem first; the tensors of a trial are allocated when it is yielded.
    """

    kernel: str
    space: tuple[Config, ...]
    trials: Callable[[], Iterator[Trial]]


def tunables(
    names: Iterable[str], stages: Iterable[int], batch: int, dtype: torch.dtype, device: torch.device
) -> list[Tunable]:
    """Return the kernels to tune, most important first.

    Args:
        names: names of kernels (``"rope2d.forward"``) or of whole operations (``"rope2d"``); empty for all kernels.
        stages: stages of the published model.
        batch: number of images; with guidance a model sees twice as many sequences.
        dtype: type of tokens and velocities.
        device: device to run on.

    Raises:
        ValueError: a kernel, operation or stage does not exist.
    """
    names, stages = tuple(names), sorted({*stages}, reverse=True)
    for name in names:
        if name not in (*OPERATIONS, *KERNELS):
            raise ValueError(f"op: got {name!r}, expected one of {', '.join((*OPERATIONS, *KERNELS))}")
    for stage in stages:
        if not 0 <= stage < len(STAGE_SIDES):
            raise ValueError(f"stage: got {stage}, expected 0 to {len(STAGE_SIDES) - 1}")
    wanted = [kernel for kernel in KERNELS if not names or kernel in names or kernel.split(".")[0] in names]
    problems = [Problem(stage, batch, dtype, device) for stage in stages]
    return [Tunable(kernel, SPACES[kernel], _maker(kernel, problems)) for kernel in wanted]


def _maker(kernel: str, problems: list[Problem]) -> Callable[[], Iterator[Trial]]:
    operation, name = kernel.split(".")

    def trials() -> Iterator[Trial]:
        module: Any = importlib.import_module(f".{operation}", __package__)  # imports Triton
        for problem in problems:
            yield from module.trials(name, problem)

    return trials

"""What ``pixelflow bench tune`` tunes: each kernel's candidates, and the problems that decide between them.

An operation's module has ``trials(kernel, problem)``; a kernel's shape classes are those that its problems fall into.
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

__all__ = ["KERNELS", "STAGE_SIDES", "Config", "Trial", "Tunable", "tunables"]

KERNELS = tuple(SPACES)
"""Most important first: what is cut short has tuned what matters most."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """A kernel to tune.

    Attributes:
        kernel: as in the tables, ``"rope2d.forward"``.
        space: configurations to try beside the present ones.
        trials: makes the problems, the largest first; tensors live while their problem is looked at.
    """

    kernel: str
    space: tuple[Config, ...]
    trials: Callable[[], Iterator[Trial]]


def tunables(
    names: Iterable[str], stages: Iterable[int], batch: int, dtype: torch.dtype, device: torch.device
) -> list[Tunable]:
    """Kernels by importance.

    Args:
        names: of kernels (``"rope2d.forward"``) or of whole operations (``"rope2d"``); none for all.
        stages: of the published model.
        batch: images; with guidance a model sees twice as many.
        dtype: of tokens and velocities.
        device: where.

    Raises:
        ValueError: there is no such kernel, operation or stage.
    """
    names, stages = tuple(names), sorted({*stages}, reverse=True)
    operations = tuple(dict.fromkeys(kernel.split(".")[0] for kernel in KERNELS))
    for name in names:
        if name not in (*operations, *KERNELS):
            raise ValueError(f"op: got {name!r}, expected one of {', '.join((*operations, *KERNELS))}")
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

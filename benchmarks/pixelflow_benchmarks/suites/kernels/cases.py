"""What ``pixelflow bench kernels`` measures: every operation at the sizes of the published model's stages."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator

import torch

from .case import STAGE_SIDES, Case, Problem

OPS = ("varlen_attention", "modulate", "rope2d", "ode_step", "cascade", "adamw")
"""Most important first: a run that is cut short has measured what matters most."""

__all__ = ["OPS", "STAGE_SIDES", "Case", "Problem", "all_cases"]


def all_cases(
    ops: Iterable[str], stages: Iterable[int], batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """The cases of some operations and stages, the largest stage first; tensors live while their case is looked at.

    Raises:
        ValueError: there is no such operation or stage.
    """
    ops, stages = tuple(ops), sorted(stages, reverse=True)
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")
    for stage in stages:
        if not 0 <= stage < len(STAGE_SIDES):
            raise ValueError(f"stage: got {stage}, expected 0 to {len(STAGE_SIDES) - 1}")
    for stage in stages:
        for op in ops:
            module = importlib.import_module(f".{op}", __package__)
            yield from module.cases(Problem(stage, batch, dtype, device))

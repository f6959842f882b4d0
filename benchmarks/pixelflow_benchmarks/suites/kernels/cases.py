"""The cases of ``pixelflow bench kernels``: every operation at the sizes of the published model's stages."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator

import torch

from .case import STAGE_SIDES, Case, Outputs, Problem

OPS = ("varlen_attention", "modulate", "rope2d", "ode_step", "cascade", "adamw")
"""Most important first, so that an interrupted run has measured what matters most."""

__all__ = ["OPS", "STAGE_SIDES", "Case", "Problem", "all_cases"]


def all_cases(
    ops: Iterable[str], stages: Iterable[int], batch: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    """Yield the cases of the given operations and stages, the largest stage first.

    The tensors of a case are allocated when it is yielded and need not be kept any longer than the case. If that fails,
    the operation has no further case at this stage but one, ``"op/shape"``, which raises the error when it is called.

    Raises:
        ValueError: an operation or a stage does not exist.
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
            problem = Problem(stage, batch, dtype, device)
            made = module.cases(problem)
            while True:
                try:
                    case = next(made)
                except StopIteration:
                    break
                except Exception as error:  # a lack of memory, for instance; the other cases are still measured
                    yield _unmade(f"{op}/{problem.label}", error)
                    break
                yield case


def _unmade(name: str, error: Exception) -> Case:
    """Return a case that raises the error, without the tensors that its traceback would keep."""
    error.with_traceback(None).__context__ = None
    error.add_note(f"while the inputs of {name} were made")

    def fail() -> Outputs:
        raise error

    return Case(name=name, variants={"ours": fail}, plain=fail, bytes_moved=0)

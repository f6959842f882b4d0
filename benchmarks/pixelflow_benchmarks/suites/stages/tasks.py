"""What ``bench stages`` runs and in which order: the most important comes first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pixelflow_engine import PixelFlowConfig

from .opponents import FIRST, SOLVER_OF, VARIANTS
from .problem import REFERENCE, StageProblem, StageSolver


@dataclass(frozen=True, slots=True)
class Task:
    """A problem and the variants that run it.

    Attributes:
        problem: the stage.
        variants: names of the variants.
    """

    problem: StageProblem
    variants: tuple[str, ...]


def tasks(
    config: PixelFlowConfig,
    variants: Sequence[str],
    stages: Sequence[int],
    batches: Sequence[int],
    solvers: Sequence[StageSolver],
    steps: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Task]:
    """Yield what to run, most important first.

    Batches are ordered 16, 1, 4, 32, then all others. The leading variants (:data:`~.opponents.FIRST`) run on the first
    batch, with Euler and with Dopri5, and on the second batch with Euler. Then the remaining variants run on the first
    batch with Euler, and nowhere else. The leading variants follow on the third and later batches with Euler, and on
    all batches but the first with Dopri5. Each of these passes takes the largest stage first.

    Args:
        config: configuration of the model.
        variants: names of the variants; the reference, which the others are checked against, is always added.
        stages, batches, solvers: what to combine, in any order.
        steps: Euler steps; by default fewer for stages of more tokens.
        dtype: type of the matrix products.
        device: device to run on.
    """
    by_batch = sorted(batches, key=lambda b: ([16, 1, 4, 32].index(b) if b in (16, 1, 4, 32) else 4, b))
    first = (REFERENCE, *(v for v in FIRST if v in variants and v != REFERENCE))
    rest = (REFERENCE, *(v for v in VARIANTS if v in variants and v not in FIRST))

    def problems(batch: int, solver: StageSolver) -> Iterator[StageProblem]:
        for stage in sorted(stages, reverse=True):
            p = StageProblem(
                config=config, stage=stage, batch=batch, steps=2, solver=solver, dtype=dtype, device=device
            )
            least, tokens = (4, 10240) if device.type == "cuda" else (2, 2048)
            number = min(30, max(least, tokens // p.tokens)) if steps is None else steps
            yield StageProblem(
                config=config, stage=stage, batch=batch, steps=number, solver=solver, dtype=dtype, device=device
            )

    order = [(batch, solver, first) for solver in ("euler", "dopri5") if solver in solvers for batch in by_batch[:1]]
    order += [(batch, "euler", first) for batch in by_batch[1:2] if "euler" in solvers]
    order += [(batch, "euler", rest) for batch in by_batch[:1] if "euler" in solvers and rest != (REFERENCE,)]
    order += [(batch, "euler", first) for batch in by_batch[2:] if "euler" in solvers]
    order += [(batch, "dopri5", first) for batch in by_batch[1:] if "dopri5" in solvers]
    for batch, solver, who in order:
        for problem in problems(batch, "euler" if solver == "euler" else "dopri5"):
            variants = tuple(v for v in who if SOLVER_OF.get(v, solver) == solver)
            yield Task(problem, variants)

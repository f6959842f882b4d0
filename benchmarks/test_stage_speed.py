"""The stages of the model, engine against reference: the cases of ``pixelflow bench stages``."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_benchmarks.commands.options import place_of
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.stages.measure import attempt_faults, ends_of, named, stage_faults
from pixelflow_benchmarks.suites.stages.opponents import PUBLIC, VARIANTS, Opponents
from pixelflow_benchmarks.suites.stages.problem import REFERENCE, Attempt, Ran, StageProblem
from pixelflow_benchmarks.suites.stages.runs import true_attempt, true_first_state
from pixelflow_benchmarks.suites.stages.tasks import tasks

DEVICE = place_of("auto")
ON_GPU = DEVICE.type == "cuda"
CONFIG = SHAPES["xl" if ON_GPU else "tiny"]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH, STEPS = (16, None) if ON_GPU else (2, 2)
WANTED = tuple(name for name in VARIANTS if name != PUBLIC)
"""All variants but the published code, which needs a checkout (``bench stages --public``)."""


def cases() -> Iterator[Any]:
    """Yield problems and variants, the most important first."""
    stages = range(CONFIG.scheduler.num_stages)
    work = tasks(CONFIG, WANTED, stages, [BATCH], ["euler", "dopri5"], STEPS, DTYPE, DEVICE)
    for problem, variant in dict.fromkeys((task.problem, variant) for task in work for variant in task.variants):
        yield pytest.param(problem, variant, id=f"stage{problem.stage}-b{BATCH}-{problem.solver}-{variant}")


@dataclass
class Known:
    """The reference's run, with the first state in float64 for Euler, or the reference's first attempt for Dopri5."""

    ran: Ran
    truth: tuple[Tensor, float] | None
    attempt: Attempt | None


@dataclass
class Expected:
    """Results that variants of the current problem are checked against."""

    opponents: Opponents
    known: dict[StageProblem, Known] = field(default_factory=dict)

    def get(self, problem: StageProblem) -> Known:
        """Return those of a problem, dropping the previous problem's."""
        if problem not in self.known:
            self.known.clear()
            gc.collect()
            weights = self.opponents.weights
            truth = true_first_state(problem, weights, ends_of(problem)) if problem.solver == "euler" else None
            run = self.opponents.runs(REFERENCE, problem)
            assert run is not None
            attempt = run.attempt() if problem.solver == "dopri5" else None
            self.known[problem] = Known(run.run(keep_first=True), truth, attempt)
        return self.known[problem]


@pytest.fixture(scope="module")
def expected() -> Iterator[Expected]:
    """Yield the opponents, whose models are made on first use."""
    opponents = Opponents(CONFIG, random_weights(CONFIG, DEVICE, DTYPE), DTYPE, None)
    yield Expected(opponents)
    opponents.close()


@pytest.mark.parametrize(("problem", "variant"), [*cases()])
def test_stage(problem: StageProblem, variant: str, expected: Expected, time_right: Any) -> None:
    """Time one variant of one problem; seconds are of a whole run."""
    known = expected.get(problem)
    run = expected.opponents.runs(variant, problem)
    if run is None:
        pytest.skip(f"{variant}: {expected.opponents.absent[variant]}")
    try:
        ran = run.run(keep_first=True)
        found = stage_faults(problem, {REFERENCE: known.ran, variant: ran}, known.truth)[variant]
        if known.attempt is not None and (attempt := run.attempt()) is not None:
            attempts = {REFERENCE: known.attempt, variant: attempt}
            found += attempt_faults(problem, attempts, partial(true_attempt, problem, expected.opponents.weights))[
                variant
            ]
        more = {"evaluations": ran.evaluations, "flops": problem.flops, "pointwise_bytes": problem.pointwise_bytes}
        time_right(named(problem)["case"], variant, run.run, found, **more)
    finally:
        run.close()

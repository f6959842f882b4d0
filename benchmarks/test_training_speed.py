"""Training steps, the project's loop against the reference's: the cases of ``pixelflow bench training``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from pixelflow_benchmarks.commands.options import place_of
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.training.checks import (
    Expected,
    batch_faults,
    gradient_faults,
    move_faults,
    reference_gradients,
)
from pixelflow_benchmarks.suites.training.opponents import BATCHES, ON_CPU, ON_GPU, PUBLIC, TrainingOpponents
from pixelflow_benchmarks.suites.training.phases import UNTIMED
from pixelflow_benchmarks.suites.training.problem import TrainingProblem

DEVICE = place_of("auto")
GPU = DEVICE.type == "cuda"
SHAPE = "xl" if GPU else "tiny"
CONFIG, DTYPE = SHAPES[SHAPE], torch.bfloat16 if GPU else torch.float32
VARIANTS = [name for name in (ON_GPU if GPU else ON_CPU) if name != PUBLIC]
"""All variants but the published code, which needs a checkout (``bench training --public``)."""

PROBLEMS = [TrainingProblem(config=CONFIG, batch=batch, dtype=DTYPE, device=DEVICE) for batch in BATCHES[SHAPE]]


class Known:
    """All variants' models, each made on first use, and the expected gradients of the current problem."""

    def __init__(self) -> None:
        self.opponents = TrainingOpponents(CONFIG, random_weights(CONFIG, DEVICE), DTYPE, DEVICE, None)
        self._expected: dict[TrainingProblem, Expected] = {}

    def get(self, problem: TrainingProblem) -> Expected:
        """Return the expected gradients, the reference's, in the variants' types and in float64."""
        if problem not in self._expected:
            batch, weights = problem.fixed_batch(), self.opponents.weights
            plain, truth = (reference_gradients(problem, weights, batch, t) for t in (torch.float32, torch.float64))
            self._expected = {problem: Expected.of(plain, truth, problem.dtype)}
        return self._expected[problem]


@pytest.fixture(scope="module")
def known() -> Iterator[Known]:
    """See :class:`Known`."""
    found = Known()
    yield found
    found.opponents.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"b{problem.batch}")
def test_training(problem: TrainingProblem, variant: str, known: Known, time_right: Any) -> None:
    """Time one variant; seconds are of a step, which includes drawing its batch."""
    expected, opponents = known.get(problem), known.opponents
    opponents.reset()
    run = opponents.run(variant, problem)
    if run is None:
        pytest.skip(f"{variant}: {opponents.absent[variant]}")
    try:
        found = gradient_faults(run.gradients(problem.fixed_batch()), expected)
        found += batch_faults(run.draw(), problem, problem.images())
        before = run.probe()
        run.step(UNTIMED)
        found += move_faults(before, run.probe(), problem.recipe.optimizer.lr)
        time_right(problem.case, variant, partial(run.step, UNTIMED), found, flops=problem.flops)
    finally:
        run.close()

"""Whole images in steady state, engine against reference: the cases of ``pixelflow bench images``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_benchmarks.commands.options import place_of
from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.images.measure import wrong
from pixelflow_benchmarks.suites.images.opponents import ON_CPU, ON_GPU, PUBLIC, REFERENCE, ImageOpponents, ImageProblem
from pixelflow_engine.errors import BackendUnavailableError

DEVICE = place_of("auto")
GPU = DEVICE.type == "cuda"
CONFIG = SHAPES["xl" if GPU else "tiny"]
DTYPE = torch.bfloat16 if GPU else torch.float32
VARIANTS = [name for name in (ON_GPU if GPU else ON_CPU) if name != PUBLIC]
"""All variants but the published code, which needs a checkout (``bench images --public``)."""

PROBLEMS = [
    ImageProblem(config=CONFIG, batch=batch, steps=10 if GPU else 2, dtype=DTYPE, device=DEVICE)
    for batch in ((1, 16) if GPU else (1,))
]


class Expected:
    """All variants' models, each made on first use, with the reference's images and those in float64."""

    def __init__(self) -> None:
        self.opponents = ImageOpponents(CONFIG, random_weights(CONFIG, DEVICE, DTYPE), DTYPE, DEVICE)
        self.known: dict[ImageProblem, tuple[Tensor, Tensor]] = {}

    def get(self, problem: ImageProblem) -> tuple[Tensor, Tensor]:
        """Return the reference's images and the float64 images of a problem."""
        if problem not in self.known:
            self.known[problem] = self.opponents.call(REFERENCE, problem)(), self.opponents.truth(problem)
        return self.known[problem]


@pytest.fixture(scope="module")
def expected() -> Iterator[Expected]:
    """See :class:`Expected`."""
    found = Expected()
    yield found
    found.opponents.close()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"b{problem.batch}")
def test_images(problem: ImageProblem, variant: str, expected: Expected, time_right: Any) -> None:
    """Time one variant; seconds are of the whole batch."""
    plain, truth = expected.get(problem)
    try:
        call = expected.opponents.call(variant, problem)
    except BackendUnavailableError as error:
        pytest.skip(f"{variant}: {first_line(error)}")
    fault = wrong({REFERENCE: plain, variant: call()}, truth).get(variant)
    more = {"flops": problem.flops, "pointwise_bytes": problem.pointwise_bytes}
    time_right(problem.case, variant, call, [fault] if fault else [], **more)

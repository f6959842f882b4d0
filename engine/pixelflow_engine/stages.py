"""What runs a stage, as the cascade sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .plan import StagePlan

States = Sequence[Tensor]
"""One tensor ``[B_g, c, h, w]`` for each group of images of one size."""

OnStep = Callable[[int, Callable[[], float], Callable[[], States]], States | None]
"""``(step, tau reached, the states)``, the latter two made when they are asked for: that may wait for the device. What
it returns, if anything, is gone on with."""


@dataclass(frozen=True, eq=False, slots=True)
class StageOutcome:
    """What a stage did.

    Attributes:
        states: at its end.
        status: of each image, ``[B]`` int32, as :mod:`pixelflow_kernels.ode_step` numbers them.
        steps: steps, or attempts of the slowest image.
        evaluations: calls of the transformer.
        tau: where each image ended, ``[B]``, for a solver with error control.
    """

    states: States
    status: Tensor
    steps: int
    evaluations: int
    tau: Tensor | None


class Stages(Protocol):
    """Runs the stages of one sampling."""

    def run(self, states: States, stage: StagePlan, on_step: OnStep) -> StageOutcome:
        """Integrate a stage from its entry to its end."""
        ...

"""Interface between the cascade and the code that runs a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .plan import StagePlan

States = Sequence[Tensor]
"""One tensor ``[B_g, c, h, w]`` for each group of images of one size."""

OnStep = Callable[[int, Callable[[], float], Callable[[], States]], States | None]
"""Step callback ``(step, tau, states)``. The time reached and the states are functions, because evaluating them may
wait for the device. If it returns states, integration continues from those."""


@dataclass(frozen=True, eq=False, slots=True)
class StageOutcome:
    """The result of a stage.

    Attributes:
        states: states at the end of the stage.
        status: status of each image, ``[B]`` int32, with the values of :mod:`pixelflow_kernels.ode_step`.
        steps: number of steps, or of attempts of the slowest image.
        evaluations: calls of the transformer.
        tau: time that each image reached, ``[B]``; None without error control.
    """

    states: States
    status: Tensor
    steps: int
    evaluations: int
    tau: Tensor | None


class Stages(Protocol):
    """Runs the stages of one sampling run."""

    def run(self, states: States, stage: StagePlan, on_step: OnStep) -> StageOutcome:
        """Integrate a stage from its start to its end."""
        ...

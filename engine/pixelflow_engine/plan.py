"""The plan of a sampling run, fixed before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pixelflow_kernels.transfers import uploaded

from .config import PixelFlowConfig
from .noise import Shape
from .operations import Text
from .schedule import Stage, make_stages
from .solvers import Tolerance

Solver = Literal["euler", "heun", "ab2", "dopri5"]
SOLVERS: tuple[Solver, ...] = ("euler", "heun", "ab2", "dopri5")


@dataclass(frozen=True, eq=False, slots=True)
class Condition:
    """Class labels and prompts of the images.

    Attributes:
        class_labels: ``[B]``, for a class-conditional model.
        text: encoded prompts, one per image, for a text-conditional model.
        null_text: the encoding of the empty prompt, one for all images or one per image.
    """

    class_labels: Tensor | None = None
    text: Text | None = None
    null_text: Text | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        """Move to a device; prompts are cast to ``dtype``."""
        labels, text, null = self.class_labels, self.text, self.null_text
        return Condition(
            class_labels=None if labels is None else uploaded(labels, device),
            text=None if text is None else _placed(text, device, dtype),
            null_text=None if null is None else _placed(null, device, dtype),
        )


def _placed(text: Text, device: torch.device, dtype: torch.dtype) -> Text:
    mask = None if text.mask is None else uploaded(text.mask.to(torch.float32), device)
    return Text(uploaded(text.states.to(dtype), device), mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        stage: the stage's place on the noise axis.
        shapes: shapes of its states, ``(B_g, c, h, w)`` for each group of images of one size.
        weights: guidance weight of each image, group after group; the null half of an image whose weight is exactly 1
            is not computed.
        num_steps: number of steps, for solvers with fixed steps.
        first_step: the first step to run; nonzero only if a given image enters partway through the stage.
    """

    stage: Stage
    shapes: tuple[Shape, ...]
    weights: tuple[float, ...]
    num_steps: int
    first_step: int = 0

    @property
    def guided(self) -> int:
        """Number of images with a null half. They come first."""
        return sum(weight != 1 for weight in self.weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """The plan of a whole sampling run, without its noise and condition.

    Attributes:
        stages: smallest first.
        solver: ``euler``, ``heun`` and ``ab2`` with fixed steps, ``dopri5`` with error control.
        shift: time shift of fixed steps; 1 spaces them evenly.
        state: ``fp32``: guidance, update and state are in at least float32. ``public``: they have the velocity's dtype
            from the first Euler step on, and the model time has the state's dtype, as in the published code under
            autocast.
        tolerance: error control of dopri5.
    """

    stages: tuple[StagePlan, ...]
    solver: Solver
    shift: float
    state: Literal["fp32", "public"]
    tolerance: Tolerance


@dataclass(frozen=True, slots=True)
class Group:
    """Images of one size that agree, at every stage, on having a null half or not.

    Attributes:
        height, width: in pixels.
        weights: guidance weights of each image, one per stage.
    """

    height: int
    width: int
    weights: tuple[tuple[float, ...], ...]


def plan_stages(config: PixelFlowConfig, groups: Sequence[Group], steps: Sequence[int]) -> tuple[StagePlan, ...]:
    """Resolutions, guidance weights and steps of each stage; groups with null halves must come first."""
    stages = make_stages(config.scheduler)
    plans = []
    for stage, num_steps in zip(stages, steps, strict=True):
        shrink = 2 ** (len(stages) - 1 - stage.index)
        plans.append(
            StagePlan(
                stage=stage,
                shapes=tuple(
                    (len(g.weights), config.model.in_channels, g.height // shrink, g.width // shrink) for g in groups
                ),
                weights=tuple(weights[stage.index] for g in groups for weights in g.weights),
                num_steps=num_steps,
            )
        )
    return tuple(plans)

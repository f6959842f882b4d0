"""What a call reports to its caller, while it runs and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .arguments import choice
from .output import OUTPUT_TYPES, Images, Latents, OutputType, to_output

Status = Literal["ok", "max_steps", "underflow", "nonfinite"]
"""Outcome of an image. ``max_steps``: Dopri5 used up its attempts. ``underflow``: its step became too small to advance
the time. ``nonfinite``: a value, or the estimate of the error, is infinite or NaN."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StepEvent:
    """The state after a step (fixed steps) or an attempt (Dopri5).

    Attributes:
        stage: index of the stage.
        step: index of the step within the stage, from 0.
        tau: local time reached; for Dopri5, that of the slowest image.
        latents: the state, which must not be modified in place. A callback may return another state of the same shape
            to continue with (not with Dopri5 or ab2, which reuse slopes of the old state).
    """

    stage: int
    step: int
    tau: float
    latents: Latents


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """Statistics of one stage.

    Attributes:
        stage: index of the stage.
        height, width: size of the largest image, in pixels.
        tokens: number of tokens of the largest image.
        guidance_weight: largest guidance weight.
        steps: number of steps, or of attempts of the slowest image for Dopri5.
        evaluations: number of transformer calls, each for the whole batch and for both guidance halves.
        seconds: wall time, including the entry into the stage and the callbacks after its steps; on a GPU, the time
            between the points at which the caller's stream entered and left the stage.
    """

    stage: int
    height: int
    width: int
    tokens: int
    guidance_weight: float
    steps: int
    evaluations: int
    seconds: float

    @staticmethod
    def together(reports: Sequence[StageReport]) -> StageReport:
        """Merge reports of batches that ran one after another.

        Evaluations and seconds are summed; steps and guidance weight are the largest; the rest is that of the largest
        image.
        """
        largest = max(reports, key=lambda report: report.tokens)
        return replace(
            largest,
            guidance_weight=max(report.guidance_weight for report in reports),
            steps=max(report.steps for report in reports),
            evaluations=sum(report.evaluations for report in reports),
            seconds=sum(report.seconds for report in reports),
        )


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StageEvent:
    """The end of a stage. If the host runs ahead of the device, only reading values waits for the stage.

    Attributes:
        latents: the state, which must not be modified in place.
        seeds: as in :class:`SamplingOutput`.
    """

    latents: Latents
    seeds: tuple[int, ...]
    _reported: Callable[[], StageReport]
    _found: Callable[[], tuple[Status, ...]]

    @property
    def report(self) -> StageReport:
        """Statistics of the stage; waits for it."""
        return self._reported()

    @property
    def statuses(self) -> tuple[Status, ...]:
        """Outcome of each image so far; all ``ok`` unless ``on_failure="report"``. Waits for the stage."""
        return self._found()

    def images(self, output_type: OutputType = "pil") -> Images:
        """The state as images, in the forms of :class:`SamplingOutput`.

        Raises:
            ValueError: the output type is unknown.
        """
        choice("output_type", output_type, OUTPUT_TYPES)
        return to_output(self.latents, output_type)


@dataclass(frozen=True, eq=False, slots=True)
class SamplingOutput:
    """Result of a call.

    Attributes:
        images: ``pil``: a list of images; ``np``: ``[B, H, W, c]`` float32 in [0, 1]; ``pt``: ``[B, c, H, W]`` float32
            in [0, 1] on the engine's device. If sizes differ, ``np`` and ``pt`` are lists of ``[H, W, c]`` and
            ``[c, H, W]``.
        stages: one report per stage, smallest first.
        seeds: with ``noise="counter"``, the seed of each image, which reproduces its noise bit for bit in any batch;
            with ``noise="public"``, the single seed of the stream, or nothing for torch's global generator.
        statuses: outcome of each image; all ``ok`` unless ``on_failure="report"``.
    """

    images: Images
    stages: tuple[StageReport, ...]
    seeds: tuple[int, ...]
    statuses: tuple[Status, ...]


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The callbacks of a call."""

    on_step_end: Callable[[StepEvent], Latents | None] | None = None
    on_stage_end: Callable[[StageEvent], None] | None = None

"""What a sampling tells its caller while it runs, and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .arguments import choice
from .output import OUTPUT_TYPES, Images, Latents, OutputType, to_output

Status = Literal["ok", "max_steps", "underflow", "nonfinite"]
"""What became of an image: ``max_steps``: Dopri5 used up its attempts; ``underflow``: its step became too small to be
added to the time; ``nonfinite``: a value, or the estimate of the error, is infinite or no number."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StepEvent:
    """The state after a step (fixed steps) or an attempt (Dopri5).

    Attributes:
        stage: index of the stage.
        step: index of the step within it, from 0.
        tau: local time reached; of the slowest image, for Dopri5.
        latents: the state, not to be written to. A callback may return another one of its shape to go on with (not
            with Dopri5 or ab2, which remember slopes of the old one).
    """

    stage: int
    step: int
    tau: float
    latents: Latents


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What a stage did.

    Attributes:
        stage: its index.
        height, width: of its images, in pixels; of the largest.
        tokens: of one image; of the largest.
        guidance_weight: the weight it ran with; the largest.
        steps: steps, or Dopri5 attempts of the slowest image.
        evaluations: calls of the transformer, each for the whole batch and for both guidance halves.
        seconds: wall time, with entering the stage and the callbacks after its steps; on a GPU between the moments at
            which the caller's stream entered the stage and left it.
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
        """Of batches that ran one after another: the largest image, all evaluations and all seconds."""
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
    """The end of a stage. Where the host runs ahead of the device, it waits for the stage only to see values.

    Attributes:
        latents: its state, not to be written to.
        seeds: of each image, as :class:`SamplingOutput` has them.
    """

    latents: Latents
    seeds: tuple[int, ...]
    _reported: Callable[[], StageReport]
    _found: Callable[[], tuple[Status, ...]]

    @property
    def report(self) -> StageReport:
        """What the stage did; waits for it."""
        return self._reported()

    @property
    def statuses(self) -> tuple[Status, ...]:
        """What became of each image so far; all ``ok`` unless ``on_failure="report"``. Waits for the stage."""
        return self._found()

    def images(self, output_type: OutputType = "pil") -> Images:
        """Pictures of the state, as :class:`SamplingOutput` has them.

        Raises:
            ValueError: there is no such form.
        """
        choice("output_type", output_type, OUTPUT_TYPES)
        return to_output(self.latents, output_type)


@dataclass(frozen=True, eq=False, slots=True)
class SamplingOutput:
    """What a call made.

    Attributes:
        images: ``pil``: a list of images; ``np``: ``[B, H, W, c]`` float32 in [0, 1]; ``pt``: ``[B, c, H, W]`` float32
            in [0, 1] on the engine's device. Where sizes differ, ``np`` and ``pt`` are lists of ``[H, W, c]`` and ``[c,
            H, W]``.
        stages: a report per stage, smallest first.
        seeds: the seed of each image, whose noise it draws again, bit for bit, in any batch (``noise="counter"``); the
            stream's one seed, or nothing for torch's global generator (``noise="public"``).
        statuses: what became of each image; all ``ok`` unless ``on_failure="report"``.
    """

    images: Images
    stages: tuple[StageReport, ...]
    seeds: tuple[int, ...]
    statuses: tuple[Status, ...]


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Whom to tell."""

    on_step_end: Callable[[StepEvent], Latents | None] | None = None
    on_stage_end: Callable[[StageEvent], None] | None = None

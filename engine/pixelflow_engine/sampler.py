"""The cascade: start from noise; at each later stage upsample and renoise; integrate every stage.

Source: arXiv 2504.07963, section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pixelflow_kernels.ode_step import ARRIVED, MAX_ATTEMPTS, NONFINITE, UNDERFLOW
from pixelflow_kernels.transfers import numbers

from .clocks import Clock
from .errors import ConvergenceError
from .events import Callbacks, StageEvent, StageReport, Status, StepEvent
from .modes import without_autocast
from .noise import NoiseSource
from .output import Latents
from .plan import SamplingPlan, StagePlan
from .ranges import named
from .stages import Stages, States

REMEMBERING = ("ab2", "dopri5")
"""Solvers that reuse slopes of earlier steps, so that a callback cannot replace the state."""

STATUSES: dict[int, Status] = {
    ARRIVED: "ok",
    MAX_ATTEMPTS: "max_steps",
    UNDERFLOW: "underflow",
    NONFINITE: "nonfinite",
}


@dataclass(frozen=True, eq=False, slots=True)
class StageEnd:
    """The state of the cascade at the end of a stage.

    Attributes:
        states: states of each group.
        reported: builds the stage's report; waits for the stage if the host runs ahead of the device.
        status: status of each image so far, ``[B]`` int32, in the order of the groups.
        order: place in the call of each image, group after group.
        seeds: seeds of the call.
    """

    states: States
    reported: Callable[[], StageReport]
    status: Tensor
    order: Sequence[int]
    seeds: tuple[int, ...]

    @property
    def event(self) -> StageEvent:
        """The event that callers receive."""
        return StageEvent(
            latents=self.latents,
            seeds=self.seeds,
            _reported=self.reported,
            _found=lambda: tuple(self.statuses().values()),
        )

    @property
    def latents(self) -> Latents:
        """The states in the order of the call."""
        return in_order(self.states, self.order)

    def statuses(self) -> dict[int, Status]:
        """Status of each image by its place in the call; waits for the stage."""
        found = self.status.tolist()
        return dict(zip(sorted({*self.order}), [STATUSES[found[i]] for i in _inverse(self.order)], strict=True))


@torch.no_grad()
def sample(
    stages: Stages,
    plan: SamplingPlan,
    states: States,
    noise: Sequence[NoiseSource],
    patch_size: int,
    callbacks: Callbacks,
    order: Sequence[int],
    clock: Clock,
    raising: bool = True,
    watched: bool = True,
    seeds: tuple[int, ...] = (),
) -> Iterator[StageEnd]:
    """Run the cascade stage by stage.

    If the host runs ahead of the device and nothing observes the stages, all stages are launched before the host waits
    for any of them; images that failed at any stage are then found at the end.

    Args:
        stages: runs the stages.
        plan: the stages to run; ``states`` already have the size of the first.
        states: initial states of each group of images.
        noise: noise source of each group.
        patch_size: the model's patch size.
        callbacks: the caller's callbacks.
        order: place in the call of each image, group after group; copies have the place of their original.
        clock: the device's clock.
        raising: raise an error if an image fails; otherwise failures are recorded and the other images continue.
        watched: whether the end of every stage is observed, so that failures are raised there.
        seeds: seeds that reproduce the noise, for events.

    Yields:
        the end of each stage; the last stage's states are in [-1, 1] or slightly beyond.

    Raises:
        FloatingPointError: an image, or Dopri5's estimate of its error, is not finite.
        ConvergenceError: Dopri5 could not meet its tolerance.
    """
    status = torch.full((len(order),), ARRIVED, dtype=torch.int32, device=states[0].device)
    told = callbacks.on_step_end is not None or callbacks.on_stage_end is not None
    watched = watched or told or not clock.ahead
    unread: list[_Passed] = []
    for number, stage in enumerate(plan.stages):
        began = clock.mark()
        with named("stage", stage.stage.index), without_autocast(states[0].device) as as_outside:
            if number > 0:
                with named("enter"):
                    states = [source.enter(x, stage.stage) for x, source in zip(states, noise, strict=True)]
            outcome = stages.run(states, stage, _step_callback(plan, stage, callbacks, order, as_outside))
        states = outcome.states
        now = outcome.status.masked_fill(_finite(states).logical_not(), NONFINITE)
        status = torch.where(status == ARRIVED, now, status)
        ended = clock.mark()
        if raising:
            unread.append(_Passed(stage, now, outcome.steps, outcome.tau))
            if watched or outcome.tau is not None or number == len(plan.stages) - 1:  # error control has waited already
                _raise_for(unread, order)
                unread.clear()
        reported = partial(_report, stage, outcome.steps, outcome.evaluations, patch_size, clock, began, ended)
        end = StageEnd(states, reported, status, order, seeds)
        if callbacks.on_stage_end is not None:
            callbacks.on_stage_end(end.event)
        yield end


def in_order(states: States, order: Sequence[int]) -> Latents:
    """Images of all groups in the order of the call, without padding; one tensor if all have the same size."""
    places = _inverse(order)
    if len(states) == 1:
        if places == list(range(len(places))):
            return states[0][: len(places)]
        return states[0].index_select(0, numbers(places, torch.int64, states[0].device))
    images = [image for x in states for image in x]
    return together([images[place] for place in places])


def together(images: list[Tensor]) -> Latents:
    """Combine images ``[c, h, w]`` into one tensor if all have the same size."""
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def in_groups(latents: Latents, like: States, order: Sequence[int]) -> States:
    """Split images in the order of the call into groups with the shapes of ``like``; the inverse of :func:`in_order`.

    Raises:
        ValueError: ``latents`` has the wrong type, number of images or shapes.
    """
    if isinstance(latents, Tensor) and latents.ndim == 0:
        raise ValueError("callback_on_step_end: got a tensor without dimensions, expected images")
    if not isinstance(latents, (Tensor, list)) or not all(isinstance(image, Tensor) for image in latents):
        raise ValueError(f"callback_on_step_end: got {type(latents).__name__}, expected a tensor or a list of tensors")
    if len(latents) != len({*order}):
        raise ValueError(f"callback_on_step_end: got {len(latents)} images, expected {len({*order})}")
    images = [latents[i] for i in order]
    groups, first = [], 0
    for x in like:
        part = images[first : first + len(x)]
        first += len(x)
        if any(image.shape != x.shape[1:] for image in part):
            shapes = [tuple(image.shape) for image in part]
            raise ValueError(f"callback_on_step_end: got images {shapes}, expected {len(x)} of {tuple(x.shape[1:])}")
        groups.append(torch.stack(part).to(x))
    return groups


def _inverse(order: Sequence[int]) -> list[int]:
    """Index of each image, by its place in the call; the indices of its copies are not needed."""
    found: dict[int, int] = {}
    for i, place in enumerate(order):
        found.setdefault(place, i)
    return [found[place] for place in sorted(found)]


def _step_callback(
    plan: SamplingPlan,
    stage: StagePlan,
    callbacks: Callbacks,
    order: Sequence[int],
    as_outside: Callable[[], AbstractContextManager[object]],
) -> Callable[[int, Callable[[], float], Callable[[], States]], States | None]:
    def tell(step: int, tau: Callable[[], float], states: Callable[[], States]) -> States | None:
        if callbacks.on_step_end is None:
            return None
        now = states()
        event = StepEvent(stage=stage.stage.index, step=step, tau=tau(), latents=in_order(now, order))
        with as_outside():
            replaced = callbacks.on_step_end(event)
        if replaced is not None and plan.solver in REMEMBERING:
            raise ValueError(
                f"callback_on_step_end: got new latents from it with solver={plan.solver!r}, expected None: "
                "it remembers slopes of the old ones"
            )
        return None if replaced is None else in_groups(replaced, now, order)

    return tell


def _finite(states: States) -> Tensor:
    return torch.cat([x.isfinite().flatten(1).all(1) for x in states])


@dataclass(frozen=True, eq=False, slots=True)
class _Passed:
    """A completed stage whose statuses have not been read yet; ``tau`` are the times reached, with error control."""

    stage: StagePlan
    status: Tensor
    steps: int
    tau: Tensor | None


def _raise_for(passed: Sequence[_Passed], order: Sequence[int]) -> None:
    """Raise an error if an image failed in one of these stages; waits for all of them with one transfer."""
    statuses = torch.stack([one.status for one in passed]).tolist()
    for one, found in zip(passed, statuses, strict=True):
        index = one.stage.stage.index
        lost = sorted({order[i] for i, s in enumerate(found) if s == NONFINITE})
        if lost:
            raise FloatingPointError(f"stage {index}: images {lost} of the batch are not finite")
        if one.tau is not None and any(s != ARRIVED for s in found):
            raise ConvergenceError(
                f"stage {index}: dopri5: {one.steps} attempts did not reach tau = 1, the slowest image is "
                f"at {one.tau.min().item():.6f}; a larger rtol or a smaller guidance scale needs fewer"
            )


def _report(
    stage: StagePlan, steps: int, evaluations: int, patch_size: int, clock: Clock, began: object, ended: object
) -> StageReport:
    _, _, height, width = max(stage.shapes, key=lambda shape: shape[2] * shape[3])
    return StageReport(
        stage=stage.stage.index,
        height=height,
        width=width,
        tokens=(height // patch_size) * (width // patch_size),
        guidance_weight=max(stage.weights),
        steps=steps,
        evaluations=evaluations,
        seconds=clock.seconds(began, ended),
    )

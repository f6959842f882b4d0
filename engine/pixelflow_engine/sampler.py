"""The cascade: noise, then at each stage upsample, renoise and integrate. Source: arXiv 2504.07963, section 3.4."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout

from . import guidance
from .config import PixelFlowConfig
from .layers import at_least_fp32, patchify, unpatchify
from .model import PackedTransformer
from .noise import NoiseSource, Shape, upsample_renoise
from .operations import Text
from .schedule import Stage, euler_times, make_stages
from .solvers import AdaptiveState, Tolerance, euler_update, integrate_adaptive
from .tableaus import DOPRI5


@dataclass(frozen=True, eq=False, slots=True)
class Condition:
    """What the images should show.

    Attributes:
        class_labels: ``[B]``, for a class-conditional model.
        text, null_text: encoded prompts and the encoding of the empty prompt, for a text-conditional model.
    """

    class_labels: Tensor | None = None
    text: Text | None = None
    null_text: Text | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What a stage will do.

    Attributes:
        stage: its place on the noise axis.
        shape: of its state, ``(B, c, h, w)``.
        weight: guidance weight; at exactly 1 the null half is not computed.
        num_steps: of the Euler solver.
    """

    stage: Stage
    shape: Shape
    weight: float
    num_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPlan:
    """A whole sampling, without its randomness and condition.

    Attributes:
        stages: smallest first.
        solver: ``euler`` with fixed steps or ``dopri5`` with error control.
        shift: time shift of Euler's steps; 1 spaces them evenly.
        state: ``fp32``: guidance, update and state are float32. ``public``: they have the velocity's type from the
            first Euler step on, and the model time that of the state, as in the published code under autocast.
        tolerance: of dopri5.
    """

    stages: tuple[StagePlan, ...]
    solver: Literal["euler", "dopri5"]
    shift: float
    state: Literal["fp32", "public"]
    tolerance: Tolerance


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StepEvent:
    """The state after a step (Euler) or an attempt (Dopri5).

    Attributes:
        stage: index of the stage.
        step: index of the step within it, from 0.
        tau: local time reached; of the slowest image, for Dopri5.
        latents: the state ``[B, c, h, w]``, not to be written to.
    """

    stage: int
    step: int
    tau: float
    latents: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What a stage did.

    Attributes:
        stage: its index.
        height, width: of its images, in pixels.
        tokens: of one image.
        guidance_weight: the weight it ran with.
        steps: Euler steps, or Dopri5 attempts of the slowest image.
        evaluations: calls of the transformer, each for the whole batch and for both guidance halves.
        seconds: wall time, with entering the stage and the callbacks after its steps.
    """

    stage: int
    height: int
    width: int
    tokens: int
    guidance_weight: float
    steps: int
    evaluations: int
    seconds: float


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class StageEvent:
    """The end of a stage: its report and its state ``latents [B, c, h, w]``, not to be written to."""

    report: StageReport
    latents: Tensor


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Whom to tell."""

    on_step_end: Callable[[StepEvent], None] | None = None
    on_stage_end: Callable[[StageEvent], None] | None = None


def plan_stages(
    config: PixelFlowConfig, batch: int, height: int, width: int, weights: tuple[float, ...], steps: tuple[int, ...]
) -> tuple[StagePlan, ...]:
    """Resolutions, weights and steps of each stage for images of ``height`` x ``width`` pixels."""
    stages = make_stages(config.scheduler)
    plans = []
    for stage, weight, num_steps in zip(stages, weights, steps, strict=True):
        shrink = 2 ** (len(stages) - 1 - stage.index)
        shape = (batch, config.model.in_channels, height // shrink, width // shrink)
        plans.append(StagePlan(stage=stage, shape=shape, weight=weight, num_steps=num_steps))
    return tuple(plans)


@torch.no_grad()
def sample(
    model: PackedTransformer,
    config: PixelFlowConfig,
    plan: SamplingPlan,
    condition: Condition,
    noise: NoiseSource,
    callbacks: Callbacks,
) -> tuple[Tensor, list[StageReport]]:
    """Run the cascade.

    Returns:
        the last stage's state ``[B, c, H, W]`` in [-1, 1] or slightly beyond, and a report per stage.

    Raises:
        FloatingPointError: an image is not finite at the end of a stage, or Dopri5's estimate of its error is not.
        ConvergenceError: Dopri5 could not meet its tolerance.
    """
    public_state = plan.state == "public" and plan.solver == "euler"
    dtype = None if public_state else at_least_fp32(model.dtype)
    x = noise.initial(plan.stages[0].shape)
    reports = []
    for stage_plan in plan.stages:
        began = _now(x.device)
        if stage_plan.stage.index > 0:
            block_noise = noise.block(stage_plan.stage.index, stage_plan.shape)
            x = upsample_renoise(x, block_noise, stage_plan.stage.alpha, stage_plan.stage.beta)
        velocity = CountedVelocity(model, stage_plan, condition, dtype)
        if plan.solver == "euler":
            x, steps = _euler(velocity, x, config, plan, stage_plan, callbacks)
        else:
            x, steps = _dopri5(velocity, x, plan, stage_plan, callbacks)
        check_finite(x, stage_plan.stage.index)
        _, _, height, width = stage_plan.shape
        report = StageReport(
            stage=stage_plan.stage.index,
            height=height,
            width=width,
            tokens=(height // config.model.patch_size) * (width // config.model.patch_size),
            guidance_weight=stage_plan.weight,
            steps=steps,
            evaluations=velocity.evaluations,
            seconds=_now(x.device) - began,
        )
        reports.append(report)
        if callbacks.on_stage_end is not None:
            callbacks.on_stage_end(StageEvent(report=report, latents=x))
    return x, reports


def check_finite(x: Tensor, stage: int) -> None:
    """Refuse to go on with, or to return, images that are not finite: ``x [B, c, h, w]``."""
    finite = x.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        images = (~finite).nonzero().flatten().tolist()
        raise FloatingPointError(f"stage {stage}: images {images} of the batch are not finite")


class CountedVelocity:
    """The guided velocity of a stage's batch in image layout, counting its evaluations.

    With guidance, the null half comes first and both halves are one pack.

    Args:
        model: the transformer.
        plan: the stage's shape and weight.
        condition: what the images should show.
        dtype: in which the halves are combined and returned; None for the type that the model gives.
    """

    def __init__(
        self, model: PackedTransformer, plan: StagePlan, condition: Condition, dtype: torch.dtype | None
    ) -> None:
        batch, _, height, width = plan.shape
        p = model.config.patch_size
        guided = plan.weight != 1
        copies = 2 if guided else 1
        grid = (height // p, width // p)
        self.model = model
        self.weight = plan.weight
        self.copies = copies
        self.dtype = dtype
        self.shape: Shape = (copies * batch, *plan.shape[1:])
        self.layout = PackedLayout.from_grids([grid] * (copies * batch), model.device)
        self.latent_size = torch.full((copies * batch,), grid[1], device=model.device)
        self.class_labels = condition.class_labels
        self.text = condition.text
        if guided and condition.class_labels is not None:
            null_labels = torch.full_like(condition.class_labels, model.config.num_classes)
            self.class_labels = torch.cat([null_labels, condition.class_labels])
        if guided and condition.text is not None and condition.null_text is not None:
            self.text = concatenate(condition.null_text, condition.text)
        self.evaluations = 0

    def __call__(self, x: Tensor, t_model: Tensor) -> Tensor:
        """``x [B, c, h, w]``, ``t_model [B]`` float32, velocity ``[B, c, h, w]``."""
        self.evaluations += 1
        p = self.model.config.patch_size
        tokens = patchify(torch.cat([x] * self.copies), p)
        times = torch.cat([t_model] * self.copies)
        out = self.model(tokens, times, self.layout, self.latent_size, self.class_labels, self.text)
        images = unpatchify(out if self.dtype is None else out.to(self.dtype), self.shape, p)
        return images if self.copies == 1 else guidance.combine(images, self.weight)


def concatenate(first: Text, second: Text) -> Text:
    """Two batches of encoded prompts of one length as one."""
    if first.mask is None and second.mask is None:
        return Text(torch.cat([first.states, second.states]))
    masks = [
        torch.ones(t.states.shape[:2], device=t.states.device) if t.mask is None else t.mask for t in (first, second)
    ]
    return Text(torch.cat([first.states, second.states]), torch.cat(masks))


def _euler(
    velocity: CountedVelocity,
    x: Tensor,
    config: PixelFlowConfig,
    plan: SamplingPlan,
    stage_plan: StagePlan,
    callbacks: Callbacks,
) -> tuple[Tensor, int]:
    tau, t_model = euler_times(stage_plan.stage, config.scheduler, stage_plan.num_steps, plan.shift)
    times = torch.from_numpy(t_model).to(x.device)
    for step in range(stage_plan.num_steps):
        time_dtype = x.dtype if plan.state == "public" else torch.float32
        v = velocity(x, times[step].to(time_dtype).expand(x.shape[0]))
        x = euler_update(x, v, float(tau[step]), float(tau[step + 1]))
        if plan.state == "public":
            x = x.to(v.dtype)
        if callbacks.on_step_end is not None:
            callbacks.on_step_end(
                StepEvent(stage=stage_plan.stage.index, step=step, tau=float(tau[step + 1]), latents=x)
            )
    return x, stage_plan.num_steps


def _dopri5(
    velocity: CountedVelocity, x: Tensor, plan: SamplingPlan, stage_plan: StagePlan, callbacks: Callbacks
) -> tuple[Tensor, int]:
    first, last = stage_plan.stage.window
    high = at_least_fp32(velocity.model.dtype)
    attempts = 0

    def field(y: Tensor, tau: Tensor) -> Tensor:
        return velocity(y, (first + (last - first) * tau).to(torch.float32))

    def count(state: AdaptiveState) -> None:
        nonlocal attempts
        if callbacks.on_step_end is not None:
            callbacks.on_step_end(
                StepEvent(stage=stage_plan.stage.index, step=attempts, tau=state.tau.min().item(), latents=state.x)
            )
        attempts += 1

    return integrate_adaptive(field, x.to(high), DOPRI5, plan.tolerance, count).x, attempts


def _now(device: torch.device) -> float:
    """Wall time in seconds with the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

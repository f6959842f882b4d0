"""Exact stages: plain PyTorch in image layout, issued step by step from the host, bitwise equal to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.ode_step import ARRIVED
from pixelflow_kernels.transfers import uploaded

from . import guidance
from .config import PixelFlowConfig
from .layers import at_least_fp32, patchify, unpatchify
from .model import PackedTransformer
from .operations import Text
from .plan import Condition, SamplingPlan, StagePlan
from .ranges import named
from .schedule import step_times
from .solvers import (
    AdaptiveState,
    euler_update,
    integrate_adaptive,
    runge_kutta_step,
    step_length,
    two_step_update,
)
from .stages import OnStep, StageOutcome
from .tableaus import DOPRI5, EULER, at_slopes, methods_of


class PlainStages:
    """Runs stages of images of one size; see :class:`pixelflow_engine.stages.Stages`.

    Args:
        model: the transformer.
        config: the model's configuration.
        plan: plan of all stages.
        condition: class labels and prompts.
    """

    def __init__(
        self, model: PackedTransformer, config: PixelFlowConfig, plan: SamplingPlan, condition: Condition
    ) -> None:
        self.model = model
        self.config = config
        self.plan = plan
        self.condition = condition

    def run(self, states: Sequence[Tensor], stage: StagePlan, on_step: OnStep) -> StageOutcome:
        """Run one group of images, all with the same guidance weight."""
        (x,) = states
        public = self.plan.state == "public"
        dtype = None if public else at_least_fp32(self.model.dtype)
        velocity = GuidedVelocity(self.model, stage, self.condition, dtype)
        if self.plan.solver == "dopri5":
            return self._dopri5(velocity, x.to(at_least_fp32(self.model.dtype)), stage, on_step)
        return self._fixed_steps(velocity, x, stage, on_step)

    def _fixed_steps(self, velocity: GuidedVelocity, x: Tensor, stage: StagePlan, on_step: OnStep) -> StageOutcome:
        tau, t_model = step_times(stage.stage, self.config.scheduler, stage.num_steps, self.plan.shift)
        method, tableau = methods_of(self.plan.solver)
        points = [at_slopes(tableau, *ends) for ends in pairwise(t_model.tolist())]
        times = uploaded(torch.tensor(points, dtype=torch.float64, device="cpu"), x.device)  # of all slopes
        previous: tuple[Tensor, float] | None = None

        def slope(y: Tensor, time: Tensor) -> Tensor:
            dtype = y.dtype if self.plan.state == "public" else torch.float32
            return velocity(y, time.to(dtype).expand(y.shape[0]))

        def slope_at(points: Tensor, y: Tensor, i: int) -> Tensor:
            return slope(y, points[i])

        for step in range(stage.first_step, stage.num_steps):
            now, after = float(tau[step]), float(tau[step + 1])
            h = step_length(now, after)
            with named("step", step):
                v = slope(x, times[step, 0])
                if method is not None and previous is not None:
                    x = two_step_update(x, v, previous[0], method, h, previous[1])
                elif tableau is EULER:  # the published code's arithmetic, for a state of any dtype
                    x = euler_update(x, v, now, after)
                else:
                    x = runge_kutta_step(x, v, partial(slope_at, times[step]), tableau, h)
            previous = (v, h)
            if self.plan.state == "public":
                x = x.to(v.dtype)
            replaced = on_step(step, partial(float, after), partial(list, [x]))
            x = x if replaced is None else replaced[0].to(x)
        status = torch.full((x.shape[0],), ARRIVED, dtype=torch.int32, device=x.device)
        return StageOutcome([x], status, stage.num_steps - stage.first_step, velocity.evaluations, None)

    def _dopri5(self, velocity: GuidedVelocity, x: Tensor, stage: StagePlan, on_step: OnStep) -> StageOutcome:
        first, last = stage.stage.window
        attempts = 0

        def field(y: Tensor, tau: Tensor) -> Tensor:
            return velocity(y, (first + (last - first) * tau).to(torch.float32))

        def count(state: AdaptiveState) -> None:
            nonlocal attempts
            on_step(attempts, lambda: state.tau.min().item(), lambda: [state.x])
            attempts += 1

        end = integrate_adaptive(field, x, DOPRI5, self.plan.tolerance, count)
        return StageOutcome([end.x], end.status, attempts, velocity.evaluations, end.tau)


class GuidedVelocity:
    """The guided velocity of a stage's batch in image layout; counts its evaluations.

    With guidance, both halves form one pack, the null half first.

    Args:
        model: the transformer.
        plan: shape and guidance weight of the stage.
        condition: class labels and prompts.
        dtype: dtype in which the halves are combined and returned; None for the model's output dtype.
    """

    def __init__(
        self, model: PackedTransformer, plan: StagePlan, condition: Condition, dtype: torch.dtype | None
    ) -> None:
        (shape,) = plan.shapes
        batch, _, height, width = shape
        p = model.config.patch_size
        weight = plan.weights[0]
        guided = weight != 1
        copies = 2 if guided else 1
        grid = (height // p, width // p)
        self.model = model
        self.weight = weight
        self.copies = copies
        self.dtype = dtype
        self.shape = (copies * batch, *shape[1:])
        self.layout = PackedLayout.from_grids([grid] * (copies * batch), model.device)
        self.latent_size = torch.full((copies * batch,), grid[1], device=model.device)
        self.class_labels = condition.class_labels
        text = condition.text
        if guided and condition.class_labels is not None:
            null_labels = torch.full_like(condition.class_labels, model.config.num_classes)
            self.class_labels = torch.cat([null_labels, condition.class_labels])
        if guided and condition.text is not None and condition.null_text is not None:
            text = Text.concatenate(condition.null_text.for_each(batch), condition.text)
        self.around = model.surroundings(self.layout, None if text is None else model.prompts(text))
        self.evaluations = 0

    def __call__(self, x: Tensor, t_model: Tensor) -> Tensor:
        """Velocity ``[B, c, h, w]`` at ``x [B, c, h, w]`` and ``t_model [B]``."""
        self.evaluations += 1
        p = self.model.config.patch_size
        tokens = patchify(torch.cat([x] * self.copies), p)
        times = torch.cat([t_model] * self.copies)
        out = self.model(tokens, times, self.layout, self.latent_size, self.class_labels, around=self.around)
        images = unpatchify(out if self.dtype is None else out.to(self.dtype), self.shape, p)
        return images if self.copies == 1 else guidance.combine(images, self.weight)

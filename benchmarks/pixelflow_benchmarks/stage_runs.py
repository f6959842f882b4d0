"""A stage of the cascade run by each opponent: the reference, the engine in its variants, the published code.

All have the same weights, the same start and the same labels, so that their states can be compared.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pixelflow_engine import PixelFlowConfig, PixelFlowEngine
from pixelflow_engine.graphs import CudaCapture
from pixelflow_engine.guidance import stagewise_weights
from pixelflow_engine.packed_stages import PackedStages, ProgramStore
from pixelflow_engine.plain_stages import PlainStages
from pixelflow_engine.plan import Condition, SamplingPlan, StagePlan
from pixelflow_engine.reference import PixelFlowTransformer, Stage, dopri5, euler_times, make_stages
from pixelflow_engine.reference.sampler import guided_velocity
from pixelflow_engine.reference.solvers import euler_step
from pixelflow_engine.schedule import make_stages as engine_stages
from pixelflow_engine.solvers import Tolerance
from pixelflow_engine.stages import OnStep, Stages, States

from .random_models import random_reference

REFERENCE = "reference"
"""The opponent that the others are checked against."""

GUIDANCE = 2.4
ATTEMPTS = 4
"""Of Dopri5, after which a run ends wherever it is: with random weights it could need any number."""

StageSolver = Literal["euler", "dopri5"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProblem:
    """What is run.

    Attributes:
        config: of the model.
        stage: of the cascade.
        batch: images; with guidance the model sees twice as many.
        steps: Euler's.
        solver: ``euler`` or ``dopri5``.
        dtype: of the matrix products.
        device: where.
    """

    config: PixelFlowConfig
    stage: int
    batch: int
    steps: int
    solver: StageSolver
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the state."""
        side = self.config.resolution >> (self.config.scheduler.num_stages - 1 - self.stage)
        return self.batch, self.config.model.in_channels, side, side

    @property
    def tokens(self) -> int:
        """Of one image."""
        return (self.shape[3] // self.config.model.patch_size) ** 2

    @property
    def weight(self) -> float:
        """Of the guidance; 1 has no null half."""
        return stagewise_weights(GUIDANCE, self.config.scheduler.num_stages)[self.stage]

    @property
    def sequences(self) -> int:
        """What the model sees."""
        return self.batch if self.weight == 1 else 2 * self.batch

    @property
    def flops(self) -> int:
        """Of the matrix products and the attention of an evaluation; a multiplication and an addition are two."""
        model, tokens = self.config.model, self.tokens
        patch = model.patch_size**2 * model.in_channels
        block = 24 * tokens * model.width**2 + 4 * tokens**2 * model.width
        return self.sequences * (model.depth * block + 4 * tokens * model.width * patch)

    @property
    def pointwise_bytes(self) -> int:
        """What an evaluation moves beside them: three fused passes a block, that read and write 12 values a channel."""
        model = self.config.model
        return 12 * self.dtype.itemsize * self.sequences * self.tokens * model.width * model.depth

    def start(self) -> Tensor:
        """The state at the stage's entry, ``[B, c, h, w]`` float32."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.stage + self.batch)
        return torch.randn(self.shape, generator=generator, device=self.device)

    def labels(self) -> Tensor:
        """Class labels ``[B]``."""
        return torch.arange(self.batch, device=self.device) * 7 % self.config.model.num_classes


@dataclass(frozen=True, eq=False, slots=True)
class Ran:
    """What a run did.

    Attributes:
        first: the state after its first Euler step, where it was asked for.
        end: the state at its end.
        steps: steps, or attempts.
        evaluations: of the model.
    """

    first: Tensor | None
    end: Tensor
    steps: int
    evaluations: int


class StageRun(Protocol):
    """A stage, ready to be run any number of times from its start."""

    def run(self, keep_first: bool = False) -> Ran:
        """Run it; on a GPU this may return before the work is done."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class EngineRun:
    """The engine's own stages, see :class:`StageRun`.

    Args:
        engine: whose model, backend, compilation and graphs are used.
        problem: the stage.
    """

    def __init__(self, engine: PixelFlowEngine, problem: StageProblem) -> None:
        config = problem.config
        self.plan = StagePlan(
            stage=engine_stages(config.scheduler)[problem.stage],
            shapes=(problem.shape,),
            weights=(problem.weight,) * problem.batch,
            num_steps=problem.steps,
        )
        sampling = SamplingPlan(
            stages=(self.plan,),
            solver=problem.solver,
            shift=1.0,
            state="fp32",
            tolerance=Tolerance(max_attempts=ATTEMPTS),
        )
        condition = Condition(class_labels=problem.labels())
        self.store = ProgramStore(CudaCapture(problem.device) if engine.graphs else None)
        self.stages: Stages
        if engine.exact:
            self.stages = PlainStages(engine.model, config, sampling, condition)
        else:
            self.stages = PackedStages(engine.model, config, sampling, condition, self.store)
        self.x = problem.start()

    @torch.no_grad()
    def run(self, keep_first: bool = False) -> Ran:
        """See :class:`StageRun`."""
        kept: list[Tensor] = []

        def keep(step: int, tau: object, states: object) -> States | None:
            if keep_first and step == 0 and callable(states):
                kept.append(states()[0].clone())
            return None

        on_step: OnStep = keep
        outcome = self.stages.run([self.x], self.plan, on_step)
        return Ran(kept[0] if kept else None, outcome.states[0], outcome.steps, outcome.evaluations)

    def close(self) -> None:
        """See :class:`StageRun`."""
        self.store.close()


class ReferenceRun:
    """The reference's step, its products in the problem's type by automatic casts, see :class:`StageRun`."""

    def __init__(self, model: PixelFlowTransformer, problem: StageProblem) -> None:
        self.model = model
        self.problem = problem
        self.x, self.labels = problem.start(), problem.labels()

    @torch.no_grad()
    def run(self, keep_first: bool = False) -> Ran:
        """See :class:`StageRun`."""
        with autocast(self.problem):
            return self._euler(keep_first) if self.problem.solver == "euler" else self._dopri5()

    def _euler(self, keep_first: bool) -> Ran:
        problem, x, first = self.problem, self.x, None
        tau, t_model = euler_times(_stage(problem), problem.steps)
        for step in range(problem.steps):
            x = euler_step(x, self._velocity(x, t_model[step].float()), tau[step], tau[step + 1])
            if step == 0 and keep_first:
                first = x
        return Ran(first, x, problem.steps, problem.steps)

    def _dopri5(self) -> Ran:
        begin, last = _stage(self.problem).window
        evaluations = 0
        x = self.x

        def field(y: Tensor, tau: Tensor) -> Tensor:
            nonlocal evaluations, x
            evaluations, x = evaluations + 1, y
            return self._velocity(y, (begin + (last - begin) * tau).float())

        try:
            x = dopri5(field, self.x, max_attempts=ATTEMPTS).x
        except RuntimeError as error:
            if "attempts did not reach" not in str(error):
                raise
        return Ran(None, x, (evaluations - 2) // 6, evaluations)

    def _velocity(self, x: Tensor, t_model: Tensor) -> Tensor:
        times = t_model.to(x.device).expand(x.shape[0])
        return guided_velocity(self.model, x, times, self.problem.weight, self.labels, None, None, torch.float32)

    def close(self) -> None:
        """See :class:`StageRun`."""


def reference_model(problem: StageProblem, weights: Mapping[str, Tensor]) -> PixelFlowTransformer:
    """The reference with float32 weights. They want gradients: only then do automatic casts keep what they made."""
    return random_reference(problem.config, weights, torch.float32).requires_grad_(True)


@contextlib.contextmanager
def autocast(problem: StageProblem) -> Iterator[None]:
    """Automatic casts to the problem's type; none where that is float32."""
    with torch.autocast(problem.device.type, torch.bfloat16, enabled=problem.dtype == torch.bfloat16):
        yield


@torch.no_grad()
def true_first_state(problem: StageProblem, weights: Mapping[str, Tensor], images: list[int]) -> tuple[Tensor, float]:
    """Some images' state after the first Euler step, in float64, and the largest true change."""
    model = random_reference(problem.config, weights, torch.float64)
    tau, t_model = euler_times(_stage(problem), problem.steps)
    x, labels = problem.start(), problem.labels()
    step = tau[1].float() - tau[0].float()
    states, change = [], 0.0
    for image in images:  # one by one: float64 attention writes its logits out
        one = slice(image, image + 1)
        time = t_model[0].float().to(x.device).expand(1)
        v = guided_velocity(model, x[one], time, problem.weight, labels[one], None, None, torch.float64)
        states.append(x[one].double() + step.to(v) * v)
        change = max(change, (step.to(v) * v).abs().max().item())
    del model
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
    return torch.cat(states), change


def _stage(problem: StageProblem) -> Stage:
    return make_stages(problem.config.scheduler.num_stages)[problem.stage]

"""Runs of a stage by each kind of variant: the reference, also under torchdiffeq; the engine; the published code."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.random_models import random_reference
from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.graphs import CudaCapture
from pixelflow_engine.packed_stages import PackedStages, ProgramStore
from pixelflow_engine.plain_stages import PlainStages
from pixelflow_engine.plan import Condition, SamplingPlan, StagePlan
from pixelflow_engine.reference import PixelFlowTransformer, Stage, dopri5, euler_times, make_stages
from pixelflow_engine.reference.sampler import guided_velocity
from pixelflow_engine.reference.solvers import COUPLING, NODES, combine, euler_step
from pixelflow_engine.schedule import make_stages as engine_stages
from pixelflow_engine.solvers import Tolerance
from pixelflow_engine.stages import OnStep, Stages, States

from .problem import ATTEMPTS, Attempt, Ran, StageProblem

Field = Callable[[Tensor, Tensor], Tensor]
"""A velocity field: a function of a state and a local time tau within the stage."""

ARRIVES = 2 + len(NODES) - 1
"""Number of the evaluation at the state that Dopri5's first attempt arrives at: two evaluations choose the step, and
six are the attempt, whose last one is at its result."""


class _ArrivedError(Exception):
    """Ends an integration after its first attempt, which it carries."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self.attempt = attempt


class EngineRun:
    """A stage by the engine, see :class:`~.problem.StageRun`.

    Args:
        engine: the engine whose model, backend, compilation and graphs are used.
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
        self.engine, self.sampling, self.condition = engine, sampling, Condition(class_labels=problem.labels())
        self.store = self._new_store()
        self.stages = self._stages(sampling, self.store)
        self.x = problem.start()

    def _new_store(self) -> ProgramStore:
        return ProgramStore(CudaCapture(self.engine.model.device) if self.engine.graphs else None)

    def _stages(self, sampling: SamplingPlan, store: ProgramStore) -> Stages:
        model, config = self.engine.model, self.engine.config
        if self.engine.exact:
            return PlainStages(model, config, sampling, self.condition)
        return PackedStages(model, config, sampling, self.condition, store)

    @torch.no_grad()
    def run(self, keep_first: bool = False) -> Ran:
        """See :class:`~.problem.StageRun`."""
        kept: list[Tensor] = []

        def keep(step: int, tau: object, states: object) -> States | None:
            if keep_first and step == 0 and callable(states):
                kept.append(states()[0].clone())
            return None

        on_step: OnStep = keep
        outcome = self.stages.run([self.x], self.plan, on_step)
        return Ran(kept[0] if kept else None, outcome.states[0], outcome.steps, outcome.evaluations)

    @torch.no_grad()
    def attempt(self) -> Attempt | None:
        """See :class:`~.problem.StageRun`; it has its own programs, which are released afterwards."""
        once, store = replace(self.sampling, tolerance=Tolerance(max_attempts=1)), self._new_store()
        try:
            outcome = self._stages(once, store).run([self.x], self.plan, lambda step, tau, states: None)
            if outcome.tau is None:
                return None
            return Attempt(outcome.states[0][-1:].clone(), float(outcome.tau[-1]))
        finally:
            store.close()

    def close(self) -> None:
        """See :class:`~.problem.StageRun`."""
        self.store.close()


class ReferenceRun:
    """A stage by the reference, with products in the problem's type by autocast, see :class:`~.problem.StageRun`."""

    def __init__(self, model: PixelFlowTransformer, problem: StageProblem) -> None:
        self.model = model
        self.problem = problem
        self.x, self.labels = problem.start(), problem.labels()

    @torch.no_grad()
    def run(self, keep_first: bool = False) -> Ran:
        """See :class:`~.problem.StageRun`."""
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
        evaluations, x = 0, self.x

        def field(y: Tensor, tau: Tensor) -> Tensor:
            nonlocal evaluations, x
            evaluations, x = evaluations + 1, y
            return self._velocity_at(y, tau)

        end = self.integrate(field, self.x)
        return Ran(None, x if end is None else end, (evaluations - 2) // 6, evaluations)

    @staticmethod
    def integrate(field: Field, x: Tensor) -> Tensor | None:
        """Integrate from the start to the end of the stage; None if :data:`ATTEMPTS` were not enough."""
        try:
            return dopri5(field, x, max_attempts=ATTEMPTS).x
        except RuntimeError as error:
            if "attempts did not reach" not in str(error):
                raise
        return None

    @torch.no_grad()
    def attempt(self) -> Attempt | None:
        """See :class:`~.problem.StageRun`.

        The result is the state and time at which the attempt's last slope is requested, whether the attempt would be
        accepted or not.
        """
        asked = 0

        def field(y: Tensor, tau: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            if asked == ARRIVES:
                raise _ArrivedError(Attempt(y[-1:], float(tau.flatten()[-1])))
            return self._velocity_at(y, tau)

        try:
            with autocast(self.problem):
                self.integrate(field, self.x)
        except _ArrivedError as arrived:
            return arrived.attempt
        return None

    def _velocity_at(self, x: Tensor, tau: Tensor) -> Tensor:
        return self._velocity(x, _model_time(self.problem, tau))

    def _velocity(self, x: Tensor, t_model: Tensor) -> Tensor:
        times = t_model.to(x.device).expand(x.shape[0])
        return guided_velocity(self.model, x, times, self.problem.weight, self.labels, None, None, torch.float32)

    def close(self) -> None:
        """See :class:`~.problem.StageRun`."""


class TorchdiffeqRun(ReferenceRun):
    """A stage by the reference's velocity under torchdiffeq's Dopri5, see :class:`~.problem.StageRun`.

    Raises:
        NotImplementedError: the problem's solver is not Dopri5.
    """

    def __init__(self, model: PixelFlowTransformer, problem: StageProblem) -> None:
        if problem.solver != "dopri5":
            raise NotImplementedError("torchdiffeq: only Dopri5 is run")
        super().__init__(model, problem)

    @staticmethod
    def integrate(field: Field, x: Tensor) -> Tensor | None:
        """See :class:`ReferenceRun`."""
        from torchdiffeq import odeint

        tolerance = Tolerance()
        try:
            states = odeint(
                lambda tau, y: field(y, tau),
                x,
                torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device),
                rtol=tolerance.rtol,
                atol=tolerance.atol,
                method="dopri5",
                options={"max_num_steps": ATTEMPTS},
            )
        except AssertionError as error:
            if "max_num_steps" not in str(error):
                raise
            return None
        return states[-1]


class PublicRun:
    """A stage by the published code, with Euler steps or its own Dopri5, see :class:`~.problem.StageRun`.

    Attributes:
        peak_bytes: peak of the memory allocated in its process, weights included; None on a CPU and before a run.
    """

    def __init__(self, process: PublicProcess, problem: StageProblem) -> None:
        self.process = process
        self.problem = problem
        self.peak_bytes: int | None = None
        asked = {"stage": problem.stage, "batch": problem.batch, "steps": problem.steps, "solver": problem.solver}
        process.ask({"do": "prepare", **asked})

    def run(self, keep_first: bool = False) -> Ran:
        """See :class:`~.problem.StageRun`; returns when the work is done. The end is a zero without ``keep_first``."""
        file = Path(self.process.folder.name) / "states.pt"
        answer = self.process.ask({"do": "run", "keep": str(file) if keep_first else None})
        self.peak_bytes = answer["peak_bytes"]
        steps, evaluations = answer["steps"], answer["evaluations"]
        if not keep_first:
            return Ran(None, torch.zeros(1), steps, evaluations)
        states = {name: x.to(self.problem.device) for name, x in torch.load(file, weights_only=True).items()}
        file.unlink()
        return Ran(states.get("first"), states["end"], steps, evaluations)

    def attempt(self) -> Attempt | None:
        """Return None: the published solver does not expose how far a step went."""
        return None

    def close(self) -> None:
        """Nothing to release: the process serves the next problem."""


def reference_model(problem: StageProblem, weights: Mapping[str, Tensor]) -> PixelFlowTransformer:
    """Make the reference with float32 weights, which require gradients: only then does autocast cache their casts."""
    return random_reference(problem.config, weights, torch.float32).requires_grad_(True)


@contextlib.contextmanager
def autocast(problem: StageProblem) -> Iterator[None]:
    """Enable autocast to bfloat16 if that is the problem's type."""
    with torch.autocast(problem.device.type, torch.bfloat16, enabled=problem.dtype == torch.bfloat16):
        yield


@torch.no_grad()
def true_first_state(problem: StageProblem, weights: Mapping[str, Tensor], images: list[int]) -> tuple[Tensor, float]:
    """Compute the float64 states of the given images after the first Euler step, and the largest true change."""
    model = random_reference(problem.config, weights, torch.float64)
    tau, t_model = euler_times(_stage(problem), problem.steps)
    x, labels = problem.start(), problem.labels()
    step = tau[1].float() - tau[0].float()
    states, change = [], 0.0
    for image in images:  # one by one: float64 attention materialises its logits
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


@torch.no_grad()
def true_attempt(problem: StageProblem, weights: Mapping[str, Tensor], length: float) -> tuple[Tensor, float]:
    """Compute the last image's float64 state after a Dopri5 step of the given length, and the largest true change."""
    model = random_reference(problem.config, weights, torch.float64)
    x, labels = problem.start()[-1:].double(), problem.labels()[-1:]
    h = torch.tensor([length], dtype=torch.float64, device=x.device)
    slopes: list[Tensor] = []
    for node, row in zip(NODES[:-1], COUPLING[:-1], strict=True):
        y = x + combine(slopes, row, h) if slopes else x
        time = _model_time(problem, node * h)
        slopes.append(guided_velocity(model, y, time, problem.weight, labels, None, None, torch.float64))
    state = x + combine(slopes, COUPLING[-1], h)
    del model
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
    return state, (state - x).abs().max().item()


def _model_time(problem: StageProblem, tau: Tensor) -> Tensor:
    """Return the model time, float32, at local times tau within the stage."""
    begin, last = _stage(problem).window
    return (begin + (last - begin) * tau).float()


def _stage(problem: StageProblem) -> Stage:
    return make_stages(problem.config.scheduler.num_stages)[problem.stage]

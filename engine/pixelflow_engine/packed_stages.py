"""A stage on the model's operations: all its images one pack, its state in tokens, its steps programs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pixelflow_kernels.ode_step import ARRIVED, RUNNING, Adaptive

from .config import PixelFlowConfig
from .fusion import follow_weights
from .graphs import Capture, load_
from .model import PackedTransformer, Prompts
from .plan import Condition, SamplingPlan, StagePlan
from .programs import AdaptiveSteps, FixedSteps, Program, labels_of, program_key
from .prompts import ProjectedPrompts
from .ranges import named
from .schedule import step_times
from .solvers import step_length, two_step_lengths
from .stage_pack import Layouts, ModulationTable, StagePack
from .stages import OnStep, StageOutcome, States
from .tableaus import at_slopes, methods_of
from .uploads import uploaded

MOST_PROGRAMS = 64
"""Kept by one engine: four stages of sixteen kinds of batches."""


class ProgramStore:
    """Programs that were made, to be used again; without capture none is kept.

    Their tensors serve one stage of one call at a time: who runs a stage takes the store with :meth:`lend`.

    Args:
        capture: makes their graphs.

    Attributes:
        programs: by what they can be used again for.
        prompts: tensors that the programs read prompts from, shared by all programs for prompts of one kind.
        layouts: of packs that were run, with capture or without.
    """

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self.programs: dict[tuple[object, ...], Program] = {}
        self.prompts: dict[tuple[object, ...], Prompts] = {}
        self.layouts = Layouts()
        self._left: object = None
        self._lock = threading.Lock()
        self._borrower: int | None = None

    @contextmanager
    def lend(self) -> Iterator[ProgramStore]:
        """Wait until no other thread launches a stage, then take the store.

        What the one before launched may still run, in another stream than the caller's: the caller's stream goes on
        after it, since both read and write the same static tensors and the same pool of memory. Whoever has the store
        already and asks again, as a callback does that calls the engine, gets one without graphs.
        """
        if self.capture is None or self._borrower == threading.get_ident():
            alone = ProgramStore(None)
            alone.layouts = self.layouts
            yield alone
            return
        with self._lock:
            self._borrower = threading.get_ident()
            try:
                if self._left is not None:
                    self.capture.follow(self._left)
                yield self
            finally:
                self._borrower = None
                self._left = self.capture.leave()

    def find(self, key: tuple[object, ...]) -> Program | None:
        """The program for that use, if there is one."""
        return self.programs.get(key)

    def keep(self, key: tuple[object, ...], program: Program) -> None:
        """Keep a program for later; where there are too many, forget the one used longest ago and its prompts."""
        if self.capture is None:
            return
        self.programs.pop(key, None)
        self.programs[key] = program  # a dictionary is in the order of insertion
        while len(self.programs) > MOST_PROGRAMS:
            self.programs.pop(next(iter(self.programs)))
        read = {id(kept.around.prompts) for kept in self.programs.values()}
        self.prompts = {kind: prompts for kind, prompts in self.prompts.items() if id(prompts) in read}

    def load_prompts(self, prompts: Prompts | None) -> Prompts | None:
        """These prompts where programs read them; without capture, where they are."""
        if self.capture is None or prompts is None:
            return prompts
        static = self.prompts.get(prompts.kind())
        if static is None:
            static = self.prompts[prompts.kind()] = prompts.clone()
        for buffer, value in zip(static.tensors(), prompts.tensors(), strict=True):
            load_(buffer, value, "text")
        return static

    def close(self) -> None:
        """Forget all of them and release their graphs; waits for a stage that is under way.

        Raises:
            RuntimeError: the caller runs it himself, in a callback.
        """
        if self._borrower == threading.get_ident():
            raise RuntimeError("close: got a call from a callback, whose steps are replayed; expected it afterwards")
        with self._lock:
            if self.capture is not None:
                self.capture.close()  # before their tensors are given up: what replays them may still run
            self.programs.clear()
            self.prompts.clear()


class PackedStages:
    """Runs stages on the model's operations, see :class:`pixelflow_engine.stages.Stages`.

    Args:
        model: the transformer, its weights side by side.
        config: of the cascade.
        plan: of the whole sampling.
        condition: what the images should show.
        store: of programs.
    """

    def __init__(
        self,
        model: PackedTransformer,
        config: PixelFlowConfig,
        plan: SamplingPlan,
        condition: Condition,
        store: ProgramStore,
    ) -> None:
        self.model = model
        self.config = config
        self.plan = plan
        self.condition = condition
        self.store = store
        self._projected: ProjectedPrompts | None = None
        self._prompts: dict[int, Prompts] = {}

    def run(self, states: States, stage: StagePlan, on_step: OnStep) -> StageOutcome:
        """All groups of images in one pack."""
        pack = StagePack(self.model, stage, self.store.layouts)
        own_prompts = self._prompts_of(stage.guided)
        with self.store.lend() as store:
            follow_weights(self.model)
            prompts = store.load_prompts(own_prompts)
            run = self._adaptive if self.plan.solver == "dopri5" else self._fixed
            return run(store, pack, prompts, pack.pack(states), on_step)

    def _prompts_of(self, guided: int) -> Prompts | None:
        """Those of a pack with so many null halves; each is projected in the first stage of a call."""
        text, null = self.condition.text, self.condition.null_text
        if text is None:
            return None
        if guided not in self._prompts:
            with named("text"):
                projected = self._projected or ProjectedPrompts(self.model, text, null)
                self._prompts[guided] = projected.pack(guided)
            if any(stage.guided != guided for stage in self.plan.stages):  # another stage will want other packs of them
                self._projected = projected
        return self._prompts[guided]

    # --- fixed steps ---------------------------------------------------------------------------------------

    def _fixed(
        self, store: ProgramStore, pack: StagePack, prompts: Prompts | None, x: Tensor, on_step: OnStep
    ) -> StageOutcome:
        stage, solver = pack.plan, self.plan.solver
        tau, t_model = step_times(stage.stage, self.config.scheduler, stage.num_steps, self.plan.shift)
        method, tableau = methods_of(solver)
        steps = uploaded(self._steps(tau.tolist(), stage.first_step), x.device)
        names = [solver if method is None else method.starter, *[solver] * (stage.num_steps - stage.first_step - 1)]
        points = [at_slopes(tableau, *ends) for ends in pairwise(t_model.tolist())]
        if method is not None:  # all steps but the first take one slope
            points = [times if step == stage.first_step else times[:1] for step, times in enumerate(points)]
        moments = list(dict.fromkeys(time for times in points for time in times))
        with named("modulations"):
            table = ModulationTable(pack, self.condition, moments)
        key = program_key(pack, prompts, "fixed")
        program = store.find(key)
        if not isinstance(program, FixedSteps):
            program = FixedSteps(pack, prompts, store.capture)
        program.prepare(*dict.fromkeys(names))
        store.keep(key, program)
        program.load(pack, x)
        evaluations = 0
        for step, name in enumerate(names, stage.first_step):
            with named("step", step):
                program.load_step(*(table.at(moments.index(time)) for time in points[step]), steps=steps[step])
                program.play(name)
            evaluations += len(points[step])
            replaced = on_step(step, partial(float, tau[step + 1]), partial(pack.unpack, program.x))
            if replaced is not None:
                program.load_state(pack.pack(replaced))
        end = pack.unpack(program.x)
        status = torch.full((len(pack.sizes),), ARRIVED, dtype=torch.int32, device=x.device)
        return StageOutcome(end, status, stage.num_steps - stage.first_step, evaluations, None)

    def _steps(self, tau: list[float], first: int) -> Tensor:
        """``[n, 2]`` float64: what the slopes of each step are multiplied by."""
        lengths = [step_length(a, b) for a, b in pairwise(tau)]
        pairs = [(h, 0.0) for h in lengths]
        method, _ = methods_of(self.plan.solver)
        if method is not None:  # the first step is its starter's
            pairs[first + 1 :] = [two_step_lengths(method, h, before) for before, h in pairwise(lengths[first:])]
        return torch.tensor(pairs, dtype=torch.float64, device="cpu")

    # --- error control -------------------------------------------------------------------------------------

    def _adaptive(
        self, store: ProgramStore, pack: StagePack, prompts: Prompts | None, x: Tensor, on_step: OnStep
    ) -> StageOutcome:
        tolerance = self.plan.tolerance
        key = program_key(pack, prompts, "adaptive", tolerance.error_norm, tolerance.max_attempts)
        program = store.find(key)
        labels = labels_of(pack, self.condition)
        if not isinstance(program, AdaptiveSteps):
            program = AdaptiveSteps(pack, prompts, store.capture, pack.plan.stage, labels, tolerance)
        program.prepare("start", "attempt")
        store.keep(key, program)
        program.load(pack, x)
        program.load_call(labels, tolerance)
        with named("start"):
            program.play("start")
        state, launched = program.state, 0
        glance = Glance(state)
        while glance.anybody_runs():
            with named("step", launched):
                program.play("attempt")
                glance.take()
            on_step(launched, lambda: glance.slowest, lambda: pack.unpack(state.x))
            launched += 1
        tried = int((state.accepted + state.rejected).max())
        evaluations = 2 + launched * (len(state.slopes) - 1)
        return StageOutcome(pack.unpack(state.x), state.status.clone(), tried, evaluations, state.tau.clone())


class Glance:
    """Sees whether another attempt is needed without making the device wait.

    While an attempt runs, what the one before it left is read. If some image was further from the end than its next
    step, it has not arrived now either, and the next attempt is launched at once. Only where all of them may have
    arrived the answer of the running attempt is waited for. (An image that failed meanwhile costs an attempt that moves
    nobody.)

    Args:
        state: of the integration.
    """

    def __init__(self, state: Adaptive) -> None:
        on_gpu = state.x.is_cuda
        self.state = state
        self.seen = [
            torch.zeros(3, len(state.tau), dtype=torch.float64, device="cpu", pin_memory=on_gpu) for _ in range(2)
        ]
        self.events = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self.taken = 0

    def take(self) -> None:
        """Ask for status, time and next step of every image as they are after what was launched so far."""
        slot, state = self.taken % 2, self.state
        now = torch.stack([state.status.double(), state.tau, state.step])
        self.seen[slot].copy_(now, non_blocking=True)
        if self.events:
            self.events[slot].record(torch.cuda.current_stream(state.x.device))
        self.taken += 1

    def _answer(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        slot = number % 2
        if self.events:
            self.events[slot].synchronize()
        status, tau, step = self.seen[slot]
        return status == RUNNING, tau, step

    def anybody_runs(self) -> bool:
        """Whether another attempt is needed."""
        if self.taken == 0:
            return True
        if self.taken > 1:
            runs, tau, step = self._answer(self.taken - 2)
            if bool((runs & (step < 1 - tau)).any()):
                return True
        return bool(self._answer(self.taken - 1)[0].any())

    @property
    def slowest(self) -> float:
        """The time that the slowest image has reached; waits for it."""
        return float(self._answer(self.taken - 1)[1].min())

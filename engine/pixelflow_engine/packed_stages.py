"""Fast stages: all images of a stage form one pack, the state stays in tokens, and steps are replayable programs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from pixelflow_kernels.ode_step import ARRIVED, RUNNING, Adaptive
from pixelflow_kernels.transfers import Download, uploaded

from .config import PixelFlowConfig
from .fusion import follow_weights
from .graphs import Capture, load_
from .model import PackedTransformer, Prompts
from .modes import without_inference_mode
from .plan import Condition, SamplingPlan, StagePlan
from .programs import AdaptiveSteps, FixedSteps, Program, labels_of, program_key
from .prompts import ProjectedPrompts
from .ranges import named
from .schedule import step_times
from .solvers import step_length, two_step_lengths
from .stage_pack import Layouts, ModulationTable, StagePack
from .stages import OnStep, StageOutcome, States
from .tableaus import at_slopes, methods_of

MOST_PROGRAMS = 64
"""Maximum number of programs that an engine keeps: four stages for sixteen kinds of batches."""


class ProgramStore:
    """A cache of step programs; without capture, nothing is cached.

    The tensors of a program serve one stage of one call at a time, so whoever runs a stage acquires the store with
    :meth:`lend`.

    Args:
        capture: captures the graphs; None disables capture.

    Attributes:
        programs: programs by :func:`pixelflow_engine.programs.program_key`.
        prompts: tensors from which the programs read prompts, shared by all programs for prompts of one kind.
        layouts: layouts of packs that have run, with or without capture.
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
        """Wait until no other thread is launching a stage, then acquire the store.

        What the previous holder launched may still be running on another stream. The caller's stream waits for it on
        the device, because both use the same static tensors and memory pool. A thread that already holds the store, as
        when a callback calls the engine, gets a store without graphs.
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
        """The program with this key, or None."""
        return self.programs.get(key)

    def keep(self, key: tuple[object, ...], program: Program) -> None:
        """Cache a program; above the maximum, evict the least recently used one and prompts that no program reads."""
        if self.capture is None:
            return
        self.programs.pop(key, None)
        self.programs[key] = program  # dictionaries keep insertion order
        while len(self.programs) > MOST_PROGRAMS:
            self.programs.pop(next(iter(self.programs)))
        read = {id(kept.around.prompts) for kept in self.programs.values()}
        self.prompts = {kind: prompts for kind, prompts in self.prompts.items() if id(prompts) in read}

    def load_prompts(self, prompts: Prompts | None) -> Prompts | None:
        """Copy prompts into the static tensors that programs read, and return those.

        Without capture, the prompts are returned as they are.
        """
        if self.capture is None or prompts is None:
            return prompts
        static = self.prompts.get(prompts.kind())
        if static is None:
            static = self.prompts[prompts.kind()] = prompts.clone()
        for buffer, value in zip(static.tensors(), prompts.tensors(), strict=True):
            load_(buffer, value, "text")
        return static

    def close(self) -> None:
        """Drop all programs and release their graphs; waits for a stage that another thread is launching.

        Raises:
            RuntimeError: called from a callback, by the thread that holds the store.
        """
        if self._borrower == threading.get_ident():
            raise RuntimeError("close: got a call from a callback, whose steps are replayed; expected it afterwards")
        with self._lock:
            if self.capture is not None:
                self.capture.close()  # first, as a replay that reads the tensors may still be running
            self.programs.clear()
            self.prompts.clear()


class PackedStages:
    """Runs stages on the model's operations; see :class:`pixelflow_engine.stages.Stages`.

    Args:
        model: the transformer, with concatenated weights.
        config: the model's configuration.
        plan: plan of all stages.
        condition: class labels and prompts.
        store: cache of programs.
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

    @without_inference_mode()
    def run(self, states: States, stage: StagePlan, on_step: OnStep) -> StageOutcome:
        """Run all groups of images as one pack."""
        pack = StagePack(self.model, stage, self.store.layouts)
        own_prompts = self._prompts_of(stage.guided)
        with self.store.lend() as store:
            follow_weights(self.model)
            prompts = store.load_prompts(own_prompts)
            run = self._adaptive if self.plan.solver == "dopri5" else self._fixed
            return run(store, pack, prompts, pack.pack(states), on_step)

    def _prompts_of(self, guided: int) -> Prompts | None:
        """Prompts of a pack with ``guided`` null halves; projected once, in the first stage of a call."""
        text, null = self.condition.text, self.condition.null_text
        if text is None:
            return None
        if guided not in self._prompts:
            with named("text"):
                projected = self._projected or ProjectedPrompts(self.model, text, null)
                self._prompts[guided] = projected.pack(guided)
            if any(stage.guided != guided for stage in self.plan.stages):  # another stage needs them packed differently
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
        if method is not None:  # all steps but the first evaluate one slope
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
        """``[n, 2]`` float64: factors by which each step multiplies its slopes."""
        lengths = [step_length(a, b) for a, b in pairwise(tau)]
        pairs = [(h, 0.0) for h in lengths]
        method, _ = methods_of(self.plan.solver)
        if method is not None:  # the first step is taken by its starter
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
    """Decides whether another attempt is needed without stalling the device.

    While an attempt runs, the results of the previous one are read. If some image was further from the end than its
    next step length, it cannot have arrived yet, and another attempt is launched at once. The host waits for the
    running attempt only if all images may have arrived. (If an image fails in the meantime, this costs one attempt that
    moves no image.)

    Args:
        state: state of the integration.
    """

    def __init__(self, state: Adaptive) -> None:
        self.state = state
        self._seen: deque[Download] = deque(maxlen=2)

    def take(self) -> None:
        """Start copying status, time and next step of every image, as of everything launched so far, to the host."""
        state = self.state
        self._seen.append(Download(torch.stack([state.status.double(), state.tau, state.step])))

    def anybody_runs(self) -> bool:
        """Whether some image is still running, so that another attempt is needed."""
        if not self._seen:
            return True
        if len(self._seen) > 1:
            status, tau, step = self._seen[0].wait()
            if bool(((status == RUNNING) & (step < 1 - tau)).any()):
                return True
        return bool((self._seen[-1].wait()[0] == RUNNING).any())

    @property
    def slowest(self) -> float:
        """The time that the slowest image has reached; waits for the device."""
        return float(self._seen[-1].wait()[1].min())

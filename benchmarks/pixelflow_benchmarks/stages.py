"""Stages of the published model, one opponent after the other in turns: right first, then time, memory and energy.

What matters most comes first, and a budget of seconds ends the run between two problems: every record stands by itself.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelflow_engine import PixelFlowConfig, PixelFlowEngine
from pixelflow_engine.errors import BackendUnavailableError

from .ceilings import Ceilings
from .cpu import graphs_compiled, quartiles
from .energy import millijoules
from .public_runs import PublicProcess, PublicRun
from .random_models import random_engine
from .stage_runs import (
    REFERENCE,
    EngineRun,
    Ran,
    ReferenceRun,
    StageProblem,
    StageRun,
    StageSolver,
    reference_model,
    true_first_state,
)
from .tables import Record

PUBLIC = "public"
HOW = {
    "eager": {"compile": False, "graphs": False},
    "compiled": {"compile": True, "graphs": False},
    "graphs": {"compile": False, "graphs": True},
    "both": {"compile": True, "graphs": True},
}
ENGINES = tuple(f"{backend}/{how}" for backend in ("triton", "flash", "torch") for how in HOW)
VARIANTS = (REFERENCE, PUBLIC, *ENGINES)
FIRST = (REFERENCE, PUBLIC, "triton/graphs", "triton/eager", "triton/both", "flash/graphs", "torch/eager", "torch/both")
"""Measured before the others."""

ENERGY_SECONDS = 2.0

LEAST_ROUNDS, TURNS_SECONDS = 3, 60.0
"""So many turns are taken however long they are, and no further one is begun after so many seconds."""


@dataclass(frozen=True, slots=True)
class Task:
    """A problem and who runs it.

    Attributes:
        problem: the stage.
        variants: opponents.
        energy: whether joules are measured too.
    """

    problem: StageProblem
    variants: tuple[str, ...]
    energy: bool


def tasks(
    config: PixelFlowConfig,
    variants: Sequence[str],
    stages: Sequence[int],
    batches: Sequence[int],
    solvers: Sequence[StageSolver],
    steps: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Task]:
    """What to run, most important first: batch 16 before 1, 4 and 32, Euler before Dopri5, large stages before small.

    Args:
        config: of the model.
        variants: opponents; the reference, which the others are checked against, is always one.
        stages, batches, solvers: which; in any order.
        steps: Euler's; by default few where they are long.
        dtype: of the matrix products.
        device: where.
    """
    by_batch = sorted(batches, key=lambda b: ([16, 1, 4, 32].index(b) if b in (16, 1, 4, 32) else 4, b))
    first = (REFERENCE, *(v for v in FIRST if v in variants and v != REFERENCE))
    rest = (REFERENCE, *(v for v in ENGINES if v in variants and v not in FIRST))

    def problems(batch: int, solver: StageSolver) -> Iterator[StageProblem]:
        for stage in sorted(stages, reverse=True):
            p = StageProblem(
                config=config, stage=stage, batch=batch, steps=2, solver=solver, dtype=dtype, device=device
            )
            number = min(30, max(4, 10240 // p.tokens)) if steps is None else steps
            yield StageProblem(
                config=config, stage=stage, batch=batch, steps=number, solver=solver, dtype=dtype, device=device
            )

    order = [(batch, solver, first) for solver in ("euler", "dopri5") if solver in solvers for batch in by_batch[:1]]
    order += [(batch, "euler", first) for batch in by_batch[1:2] if "euler" in solvers]
    order += [(batch, "euler", rest) for batch in by_batch[:1] if "euler" in solvers and rest != (REFERENCE,)]
    order += [(batch, "euler", first) for batch in by_batch[2:] if "euler" in solvers]
    order += [(batch, "dopri5", first) for batch in by_batch[1:] if "dopri5" in solvers]
    for place, (batch, solver, who) in enumerate(order):
        for problem in problems(batch, "euler" if solver == "euler" else "dopri5"):
            variants = who if solver == "euler" else tuple(v for v in who if v != PUBLIC)  # it is run by Euler alone
            yield Task(problem, variants, energy=place == 0)


@dataclass(eq=False)
class Opponents:
    """Models of all variants, made when they are first asked for; who cannot be had is told once.

    Args:
        config: of the model.
        weights: of all of them, exact in ``dtype``.
        dtype: of the matrix products.
        public: a checkout of the published code.
    """

    config: PixelFlowConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    public: Path | None
    absent: dict[str, str] = field(default_factory=dict)
    _made: dict[str, Any] = field(default_factory=dict)

    def runs(self, name: str, problem: StageProblem) -> StageRun | None:
        """The variant ready to run, or None where ``absent`` has the reason."""
        if name in self.absent:
            return None
        if name not in self._made:
            try:
                self._made[name] = self._make(name, problem)
            except (BackendUnavailableError, ValueError, RuntimeError, OSError) as error:
                self.absent[name] = _line(error)
                return None
        return self._run(self._made[name], problem)

    def _make(self, name: str, problem: StageProblem) -> Any:
        if name == REFERENCE:
            return reference_model(problem, self.weights)
        if name == PUBLIC:
            if self.public is None:
                raise ValueError("public: no checkout of the published code was given")
            return PublicProcess(self.public, problem)
        backend, _, how = name.partition("/")
        return random_engine(self.config, self.weights, self.dtype, backend, **HOW[how])

    @staticmethod
    def _run(made: Any, problem: StageProblem) -> StageRun:
        if isinstance(made, PixelFlowEngine):
            return EngineRun(made, problem)
        return PublicRun(made, problem) if isinstance(made, PublicProcess) else ReferenceRun(made, problem)

    def size(self, name: str) -> int:
        """Bytes of a variant's weights, which lie there before it runs."""
        made = self._made[name]
        module = made.model if isinstance(made, PixelFlowEngine) else made
        if not isinstance(module, torch.nn.Module):
            return 0
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}
        kept |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}
        return sum(kept.values())

    def close(self) -> None:
        """End the published code's process."""
        for made in self._made.values():
            if isinstance(made, PublicProcess):
                made.close()


def measure_stages(
    work: Iterable[Task], opponents: Opponents, ceilings: Ceilings, rounds: int, budget: float
) -> Iterator[Record]:
    """Run one task after the other until the budget is spent; what runs then ends after the turn that it is in.

    Yields:
        ``stage`` for each problem and variant; ``absent`` once for who cannot be had; ``skipped`` for what no time was
        left for.
    """
    deadline, told = time.perf_counter() + budget, set[str]()
    for task in work:
        if time.perf_counter() > deadline:
            yield {"kind": "skipped", **named(task.problem), "variants": list(task.variants)}
            continue
        yield from measure_task(task, opponents, ceilings, rounds, deadline)
        for name, reason in opponents.absent.items():
            if name not in told:
                told.add(name)
                yield {"kind": "absent", "variant": name, "reason": reason}
        _tidy(task.problem)


def named(problem: StageProblem) -> Record:
    """What says which problem a record belongs to."""
    return {
        "stage": problem.stage,
        "batch": problem.batch,
        "solver": problem.solver,
        "tokens": problem.tokens,
        "weight": problem.weight,
    }


def measure_task(
    task: Task, opponents: Opponents, ceilings: Ceilings, rounds: int, deadline: float = math.inf
) -> Iterator[Record]:
    """Check every variant, time the right ones in turns, then energy.

    Args:
        task: the problem and who runs it.
        opponents: their models.
        ceilings: of the device.
        rounds: turns.
        deadline: after which no turn is begun, on the clock of ``time.perf_counter``; there is one turn at least.
    """
    problem = task.problem
    euler = problem.solver == "euler"
    # First, while there is room: float64 takes much.
    truth = true_first_state(problem, opponents.weights, ends_of(problem)) if euler else None
    records: dict[str, Record] = {}
    runs: dict[str, StageRun] = {}
    checks: dict[str, Ran] = {}
    for name in task.variants:
        record = {"kind": "stage", **named(problem), "variant": name}
        try:
            run = opponents.runs(name, problem)
            if run is None:
                continue
            runs[name] = run
            checks[name], found = _first_run(run, problem)
        except Exception as error:  # a compiler fails in many ways; the others are measured all the same
            found = {"right": False, "fault": f"{type(error).__name__}: {_line(error)}"}
        if "peak_bytes" in found:
            found["peak_bytes"] += opponents.size(name)
        records[name] = record | found
    for name, faults in stage_faults(problem, checks, truth).items():
        records[name] |= {"right": not faults} | ({"fault": "; ".join(faults)} if faults else {})
    right = {name: run for name, run in runs.items() if records[name]["right"]}
    turns, failed = _in_turns(right, problem, rounds, deadline)
    for name, seconds in turns.items():
        records[name] |= figures(problem, checks[name], seconds, ceilings)
    for name, fault in failed.items():
        records[name] |= {"right": False, "fault": fault}
    if task.energy and problem.device.type == "cuda":
        for name in turns:
            records[name] |= _energy(right[name], problem, checks[name].evaluations)
    for run in runs.values():
        run.close()
    yield from records.values()


def _first_run(run: StageRun, problem: StageProblem) -> tuple[Ran, Record]:
    """Run for the first time, which compiles and captures; its memory is that beside what lay there before."""
    on_gpu = problem.device.type == "cuda"
    before = torch.cuda.memory_allocated(problem.device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(problem.device)
    compiled = graphs_compiled()
    seconds, ran = _timed(partial(run.run, keep_first=True), problem)
    found: Record = {
        "first_seconds": seconds,
        "graphs_compiled": graphs_compiled() - compiled,
        "steps": ran.steps,
        "evaluations": ran.evaluations,
    }
    if on_gpu and not isinstance(run, PublicRun):
        found["peak_bytes"] = torch.cuda.max_memory_allocated(problem.device) - before
    return ran, found


def ends_of(problem: StageProblem) -> list[int]:
    """The images that are checked: the first and the last."""
    return sorted({0, problem.batch - 1})


def stage_faults(
    problem: StageProblem, checks: Mapping[str, Ran], truth: tuple[Tensor, float] | None
) -> dict[str, list[str]]:
    """What is wrong with each variant: its end is not finite, or its first Euler step misses level D.

    Args:
        problem: the stage.
        checks: first runs; the reference's, in the problem's type, sets the bound.
        truth: the states of :func:`ends_of` in float64 after that step, and the largest change. None for Dopri5, whose
            end depends on decisions: finiteness is all there, and Euler's check has the same model.
    """
    found: dict[str, list[str]] = {
        name: [] if bool(ran.end.isfinite().all()) else ["not finite"] for name, ran in checks.items()
    }
    plain = checks.get(REFERENCE)
    if truth is None or plain is None or plain.first is None:
        return found
    images, (state, change) = ends_of(problem), truth
    unit = torch.finfo(problem.dtype).eps / 2
    allowed = 2 * (plain.first[images].double() - state).abs().max().item() + 2 * unit * change
    for name, ran in checks.items():
        if ran.first is None:
            continue
        error = (ran.first[images].double() - state).abs().max().item()
        # The published code rounds its state, too.
        bound = allowed + (unit * state.abs().max().item() if name == PUBLIC else 0.0)
        if not error <= bound:
            found[name].append(f"error {error:.3e}, bound {bound:.3e}")
    return found


def figures(problem: StageProblem, ran: Ran, seconds: list[float], ceilings: Ceilings) -> Record:
    """Milliseconds per image and evaluation of the model, and the share that the device's ceilings alone would take.

    A step of Euler's is one evaluation; an attempt of Dopri5 is six, and its start two.
    """
    per = 1000 / problem.batch
    floor = problem.flops / ceilings.flops_per_second + problem.pointwise_bytes / ceilings.bytes_per_second
    milliseconds = quartiles([s * per / ran.evaluations for s in seconds])
    return {
        "rounds": len(seconds),
        "milliseconds": milliseconds,
        "floor_milliseconds": floor * per,
        "fraction_of_floor": floor * per / milliseconds["median"],
    }


def _in_turns(
    runs: Mapping[str, StageRun], problem: StageProblem, rounds: int, deadline: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each turn, and who failed meanwhile and why."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failed: dict[str, str] = {}
    began = time.perf_counter()
    for turn in range(rounds):
        now = time.perf_counter()
        if turn > 0 and (now > deadline or (turn >= LEAST_ROUNDS and now - began > TURNS_SECONDS)):
            break
        for name in list(seconds):
            try:
                seconds[name].append(_timed(runs[name].run, problem)[0])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {_line(error)}"
                del seconds[name]
    return seconds, failed


def _timed(run: Callable[[], Ran], problem: StageProblem) -> tuple[float, Ran]:
    _wait(problem)
    began = time.perf_counter()
    ran = run()
    _wait(problem)
    return time.perf_counter() - began, ran


def _tidy(problem: StageProblem) -> None:
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(problem: StageProblem) -> None:
    if problem.device.type == "cuda":
        torch.cuda.synchronize(problem.device)


def _energy(run: StageRun, problem: StageProblem, evaluations: int) -> Record:
    """Joules per image and evaluation from the board's counter, over a window of at least two seconds."""
    _wait(problem)
    before, began, times = millijoules(problem.device), time.perf_counter(), 0
    while time.perf_counter() - began < ENERGY_SECONDS:
        run.run()
        _wait(problem)
        times += 1
    after, seconds = millijoules(problem.device), time.perf_counter() - began
    if before is None or after is None:
        return {}
    joules = (after - before) / 1000
    return {
        "joules_per_image": joules / (times * problem.batch * evaluations),
        "watts": joules / seconds,
        "energy_seconds": seconds,
    }


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

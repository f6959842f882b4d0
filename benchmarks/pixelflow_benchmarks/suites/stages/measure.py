"""Measurement of stages by every variant: results are checked first, then time, memory and energy are measured.

Variants are timed in interleaved rounds. A run whose time budget is spent ends between two problems; every record is
meaningful without those that follow.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.energy import joules_of
from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.timing import (
    Timing,
    end_of_turns,
    first_line,
    graphs_compiled,
    lacks_memory,
    seconds_of,
    time_runs,
)

from .opponents import PUBLIC, Opponents
from .problem import REFERENCE, Attempt, Ran, StageProblem, StageRun
from .runs import PublicRun, true_attempt, true_first_state
from .tasks import Task

NOTHING_TO_COMPARE = "nothing to compare with: the reference failed"


def measure_stages(
    work: Iterable[Task], opponents: Opponents, ceilings: Ceilings, repeats: int, budget: float
) -> Iterator[Record]:
    """Run one task after the other until the budget is spent; the task that runs then ends after its current round.

    Args:
        work: tasks, the most important first.
        opponents: models of the variants.
        ceilings: measured ceilings of the device.
        repeats: number of rounds.
        budget: seconds.

    Yields:
        A ``measurement`` for each problem and variant; ``absent`` once for a variant that cannot run; ``skipped`` for a
        task that there was no time left for.
    """
    deadline, told, measured = time.perf_counter() + budget, set[str](), set[tuple[str, str]]()
    for task in work:
        if time.perf_counter() > deadline:
            yield {"kind": "skipped", **named(task.problem), "variants": list(task.variants)}
            continue
        for record in measure_task(task, opponents, ceilings, repeats, deadline):
            # The reference runs in every task that compares with it; only its first measurement is reported.
            if (of := (record["case"], record["variant"])) not in measured:
                measured.add(of)
                yield record
        for name, reason in opponents.absent.items():
            if name not in told:
                told.add(name)
                yield {"kind": "absent", "variant": name, "reason": reason}
        _tidy(task.problem)


def named(problem: StageProblem) -> Record:
    """Return the fields that identify the problem of a record."""
    return {
        "case": f"stage {problem.stage}, batch {problem.batch}, {problem.solver}",
        "stage": problem.stage,
        "batch": problem.batch,
        "solver": problem.solver,
        "tokens": problem.tokens,
        "weight": problem.weight,
    }


def measure_task(
    task: Task, opponents: Opponents, ceilings: Ceilings, repeats: int, deadline: float = math.inf
) -> Iterator[Record]:
    """Check every variant, time the right ones in rounds, then measure energy: the fastest's and its opponents'.

    Args:
        task: the problem and its variants.
        opponents: models of the variants.
        ceilings: measured ceilings of the device.
        repeats: number of rounds.
        deadline: time after which no round is begun and no energy measured, on the clock of ``time.perf_counter``; at
            least one round runs.

    Yields:
        A ``measurement`` for each variant that can run.
    """
    runs: dict[str, StageRun] = {}
    try:
        yield from _check_and_time(task, runs, opponents, ceilings, repeats, deadline)
    finally:
        for run in runs.values():
            run.close()


def _check_and_time(
    task: Task, runs: dict[str, StageRun], opponents: Opponents, ceilings: Ceilings, repeats: int, deadline: float
) -> Iterator[Record]:
    """Yield the records of :func:`measure_task`, which closes the runs that were begun, by name in ``runs``."""
    problem = task.problem
    euler = problem.solver == "euler"
    # First, while there is memory for it: float64 takes much.
    truth = true_first_state(problem, opponents.weights, ends_of(problem)) if euler else None
    records: dict[str, Record] = {}
    checks: dict[str, Ran] = {}
    attempts: dict[str, Attempt] = {}
    for name in task.variants:
        record = {"kind": "measurement", **named(problem), "variant": name}
        try:
            run = opponents.runs(name, problem)
            if run is None:
                continue
            runs[name] = run
            checks[name], found = _first_run(run, problem)
            if not euler and (attempt := run.attempt()) is not None:
                attempts[name] = attempt
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            found = {"right": False, "fault": first_line(error)}
            checks.pop(name, None)
        if "peak_bytes" in found:
            found["peak_bytes"] += opponents.size(name)
        records[name] = record | found
    wrong = stage_faults(problem, checks, truth)
    try:
        missed = attempt_faults(problem, attempts, partial(true_attempt, problem, opponents.weights))
    except (RuntimeError, MemoryError) as error:  # what was not checked gets no time, but the run continues
        if not lacks_memory(first_line(error)):
            raise
        missed = {name: [f"first attempt: not compared with float64, {first_line(error)}"] for name in attempts}
    for name, faults in missed.items():
        wrong[name] += faults
    for name, faults in wrong.items():
        records[name] |= {"right": not faults} | ({"fault": "; ".join(faults)} if faults else {})
    right = {name: run for name, run in runs.items() if records[name]["right"]}
    calls = {name: run.run for name, run in right.items()}
    timed = time_runs(calls, problem.device, repeats, end_of_turns(deadline))
    times = {name: per_evaluation(problem, checks[name], timing) for name, timing in timed.timings.items()}
    for name, fault in timed.failed.items():
        records[name] |= {"right": False, "fault": fault}
    others_of = [name for name in times if name not in (REFERENCE, PUBLIC)]
    fastest = min(others_of, key=lambda name: times[name].median, default=None)
    for name, record in records.items():  # each as soon as it is complete: an interrupted run keeps those before
        if name in times:
            record |= figures(problem, times[name], ceilings)
            others = {other: times[other] for other in (REFERENCE, PUBLIC) if other in times}
            record["times"] = {other: times[name].times_faster_than(its) for other, its in others.items()}
            if (
                name in (REFERENCE, PUBLIC, fastest)
                and time.perf_counter() < deadline
                and (found := joules_of(calls[name], problem.device))
            ):
                found["joules"] /= problem.batch * checks[name].evaluations
                record |= found
        yield record


def _first_run(run: StageRun, problem: StageProblem) -> tuple[Ran, Record]:
    """Run for the first time, which compiles and captures; its peak memory is that beyond what was allocated before."""
    on_gpu = problem.device.type == "cuda"
    before = torch.cuda.memory_allocated(problem.device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(problem.device)
    compiled = graphs_compiled()
    seconds, ran = seconds_of(partial(run.run, keep_first=True), problem.device)
    found: Record = {
        "first_seconds": seconds,
        "graphs_compiled": graphs_compiled() - compiled,
        "steps": ran.steps,
        "evaluations": ran.evaluations,
    }
    if isinstance(run, PublicRun):  # its process holds no other model
        found |= {} if run.peak_bytes is None else {"peak_bytes": run.peak_bytes}
    elif on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(problem.device) - before
    return ran, found


def ends_of(problem: StageProblem) -> list[int]:
    """Return the indices of the images that are checked: the first and the last."""
    return sorted({0, problem.batch - 1})


def stage_faults(
    problem: StageProblem, checks: Mapping[str, Ran], truth: tuple[Tensor, float] | None
) -> dict[str, list[str]]:
    """Return what is wrong with each variant: its end is not finite, or its first Euler step misses level D.

    Without the reference nothing says how near is near enough, so nothing passes.

    Args:
        problem: the stage.
        checks: first runs of the variants; the reference's, in the problem's type, sets the bound.
        truth: float64 states of the images of :func:`ends_of` after the first step, and the largest change. None for
            Dopri5, whose end depends on accepted step lengths: see :func:`attempt_faults`.
    """
    found: dict[str, list[str]] = {
        name: [] if bool(ran.end.isfinite().all()) else ["not finite"] for name, ran in checks.items()
    }
    plain = checks.get(REFERENCE)
    if truth is None:
        return found
    if plain is None or plain.first is None:
        return {name: [*faults, NOTHING_TO_COMPARE] for name, faults in found.items()}
    images, (state, change) = ends_of(problem), truth
    unit = torch.finfo(problem.dtype).eps / 2
    allowed = 2 * (plain.first[images].double() - state).abs().max().item() + 2 * unit * change
    for name, ran in checks.items():
        if ran.first is None:
            continue
        error = (ran.first[images].double() - state).abs().max().item()
        # The published code also rounds its state to the problem's type.
        bound = allowed + (unit * state.abs().max().item() if name == PUBLIC else 0.0)
        if not error <= bound:
            found[name].append(f"error {error:.3e}, bound {bound:.3e}")
    return found


def attempt_faults(
    problem: StageProblem, attempts: Mapping[str, Attempt], truth: Callable[[float], tuple[Tensor, float]]
) -> dict[str, list[str]]:
    """Return what is wrong with the first attempt of each variant: it misses level D, or was rejected.

    The length of the first step is chosen from differences of slopes, which every variant rounds differently. Each
    attempt is therefore compared with a float64 step of its own length, and the bound of a step longer than the
    reference's grows in proportion. The first step is a cautious one, which a correct solver never rejects.

    Args:
        problem: the stage, with Dopri5.
        attempts: first attempts of the variants; the reference's, in the problem's type, sets the bound, and without it
            nothing passes.
        truth: returns, for a step length, the last image's state in float64 after the step, and the largest change.
    """
    found: dict[str, list[str]] = {name: [] for name in attempts}
    truth, unit = cache(truth), torch.finfo(problem.dtype).eps / 2

    def error(attempt: Attempt) -> float:
        return (attempt.state.double() - truth(attempt.reached)[0]).abs().max().item()

    if REFERENCE not in attempts:
        return {name: [NOTHING_TO_COMPARE] for name in attempts}
    plain = attempts[REFERENCE]
    bound = 2 * error(plain) + 2 * unit * truth(plain.reached)[1]
    for name, attempt in attempts.items():
        if not 0 < attempt.reached <= 1:
            found[name].append(f"the first attempt reached {attempt.reached}, expected a place after 0 and up to 1")
            continue
        missed, allowed = error(attempt), bound * max(1.0, attempt.reached / plain.reached)
        if not missed <= allowed:
            found[name].append(f"first attempt: error {missed:.3e}, bound {allowed:.3e}")
    return found


def per_evaluation(problem: StageProblem, ran: Ran, timing: Timing) -> Timing:
    """Convert the times of whole runs into times per image and evaluation of the model.

    An Euler step is one evaluation; an attempt of Dopri5 is six, and its start two.
    """
    return Timing(tuple(seconds / (problem.batch * ran.evaluations) for seconds in timing.turns))


def figures(problem: StageProblem, timing: Timing, ceilings: Ceilings) -> Record:
    """Return seconds per image and evaluation, and the floor at the device's ceilings as a share of them."""
    floor = ceilings.floor(problem.flops, problem.pointwise_bytes) / problem.batch
    return {
        "per": "image and evaluation",
        "seconds": timing.spread(),
        "flops": problem.flops / problem.batch,
        "bytes": problem.pointwise_bytes / problem.batch,
        "floor_seconds": floor,
        "fraction_of_floor": floor / timing.median,
    }


def _tidy(problem: StageProblem) -> None:
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()

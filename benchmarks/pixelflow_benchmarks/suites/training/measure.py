"""Measurement of training steps by every variant.

Batches, losses, gradients and a step are checked first; then wall time is measured in interleaved rounds.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

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

from .checks import Expected, batch_faults, gradient_faults, move_faults, reference_gradients
from .opponents import PUBLIC, TrainingOpponents
from .phases import UNTIMED, PhaseClock
from .problem import REFERENCE, Gradients, TrainingProblem, TrainingRun

TURN_SECONDS, MOST_STEPS = 0.4, 10
"""A turn of a variant takes about so long, and at most so many steps: they follow one another, as in training, where a
short step finds in the caches what the last one left there."""
BREAKDOWN_STEPS, BREAKDOWN_SECONDS = 10, 5.0
"""Number of steps, and seconds, over which the shares of a step's parts are measured: no further step is begun after
these seconds. These steps follow those that are timed as a whole."""


def measure_training(
    problem: TrainingProblem,
    opponents: TrainingOpponents,
    names: tuple[str, ...],
    ceilings: Ceilings,
    repeats: int,
    deadline: float = math.inf,
) -> Iterator[Record]:
    """Check every variant, then time the right ones.

    Args:
        problem: the training problem.
        opponents: models of all variants.
        names: names of the variants; the reference is always added.
        ceilings: measured ceilings of the device.
        repeats: number of rounds.
        deadline: time after which no variant and no round is begun, on the clock of ``time.perf_counter``; variants
            that have begun are timed for at least one round.

    Yields:
        A ``measurement`` of each variant, in seconds per step; its ``first_seconds`` are those of the first forward and
        backward pass, compilation included. ``absent`` for a variant that cannot run, or that has not enough memory for
        this batch. ``skipped`` for what there was no time left for.
    """
    if time.perf_counter() > deadline:
        yield {"kind": "skipped", "case": problem.case, "reason": "no time was left"}
        return
    opponents.reset()
    runs: dict[str, TrainingRun] = {}
    told = set(opponents.absent)
    for name in dict.fromkeys((REFERENCE, *names)):
        run = opponents.run(name, problem)
        if run is not None:
            runs[name] = run
        elif name not in told:
            yield {"kind": "absent", "variant": name, "reason": opponents.absent[name]}
    try:
        yield from check_and_time(problem, runs, opponents, ceilings, repeats, deadline)
    finally:
        for run in runs.values():
            run.close()
        gc.collect()
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()


def check_and_time(
    problem: TrainingProblem,
    runs: Mapping[str, TrainingRun],
    opponents: TrainingOpponents,
    ceilings: Ceilings,
    repeats: int,
    deadline: float = math.inf,
) -> Iterator[Record]:
    """Yield the ``measurement`` of each run; see :func:`measure_training`."""
    records: dict[str, Record] = {}
    lacking: dict[str, Record] = {}
    batch, data, rate = problem.fixed_batch(), problem.images(), problem.recipe.optimizer.lr
    truth, plain = (reference_gradients(problem, opponents.weights, batch, t) for t in (torch.float64, torch.float32))
    expected = Expected.of(plain, truth, problem.dtype)
    for name, run in runs.items():
        if records and time.perf_counter() > deadline:
            yield {"kind": "skipped", "case": problem.case, "variant": name, "reason": "no time was left"}
            continue
        record: Record = {"kind": "measurement", "case": problem.case, "variant": name, "right": True}
        records[name] = record | {"batch": problem.batch, "tokens": problem.tokens}
        before = graphs_compiled()
        try:
            found: Gradients
            records[name]["first_seconds"], found = seconds_of(partial(run.gradients, batch), problem.device)
            records[name]["graphs_compiled"] = graphs_compiled() - before
            faults = gradient_faults(found, expected)
            faults += batch_faults(run.draw(), problem, data)
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            _note(first_line(error), records[name], lacking)
        else:
            _blame(records[name], faults)
    # Steps come last, as they move the weights that the other variants are checked with.
    took = {}
    for name, run in runs.items():
        if name not in records or not records[name]["right"] or name in lacking:
            continue
        try:
            weights = run.probe()
            took[name], _ = seconds_of(partial(run.step, UNTIMED), problem.device)
            _blame(records[name], move_faults(weights, run.probe(), rate))
        except Exception as error:
            _note(first_line(error), records[name], lacking)
    right = {name: runs[name] for name, record in records.items() if record["right"] and name not in lacking}
    in_a_row = steps_in_a_row([took[name] for name in right])
    turns = {name: partial(take_steps, run, in_a_row) for name, run in right.items()}
    timed = time_runs(turns, problem.device, repeats, end_of_turns(deadline))
    timings = {name: Timing(tuple(s / in_a_row for s in timing.turns)) for name, timing in timed.timings.items()}
    for name, said in timed.failed.items():
        _note(said, records[name], lacking)
    for name, record in records.items():  # each as soon as it is complete: an interrupted run keeps those before
        if name in timings:
            try:
                beside = _beside(problem, right[name])
                _blame(record, _step_faults(right[name]))
            except Exception as error:
                _note(first_line(error), record, lacking)
            else:
                if record["right"]:
                    record |= figures(problem, timings[name], ceilings) | beside | {"steps_in_a_row": in_a_row}
                    others = {other: timings[other] for other in (REFERENCE, PUBLIC) if other in timings}
                    record["times"] = {o: timings[name].times_faster_than(its) for o, its in others.items()}
                    one_step = partial(take_steps, right[name], 1)
                    if time.perf_counter() < deadline and (energy := joules_of(one_step, problem.device)):
                        record |= energy
        yield lacking.get(name, record)


def figures(problem: TrainingProblem, timing: Timing, ceilings: Ceilings) -> Record:
    """Return seconds per step, images and tokens per second, and how close that is to the device's ceilings.

    ``mfu`` is the rate of the model's own operations, forward and backward, divided by the rate of a large product in
    the same run. ``fraction_of_floor`` also counts the bytes that fused passes and a single-pass optimizer would move.
    """
    floor = ceilings.floor(problem.flops, problem.bytes_moved)
    return {
        "per": "step",
        "seconds": timing.spread(),
        "images_per_second": problem.batch / timing.median,
        "tokens_per_second": problem.tokens / timing.median,
        "flops": problem.flops,
        "mfu": problem.flops / timing.median / ceilings.flops_per_second,
        "floor_seconds": floor,
        "fraction_of_floor": floor / timing.median,
    }


def steps_in_a_row(took: Sequence[float]) -> int:
    """Return the number of steps of a turn, the same for all variants, given the seconds of a step of each."""
    return min(max(round(TURN_SECONDS / min(took)), 1), MOST_STEPS) if took else 1


def take_steps(run: TrainingRun, count: int) -> None:
    """Run steps one after another."""
    for _ in range(count):
        run.step(UNTIMED)


def breakdown(run: TrainingRun, device: torch.device, steps: int = BREAKDOWN_STEPS) -> dict[str, float]:
    """Measure the share of each part of a step, see :meth:`~.phases.PhaseClock.shares`, over at least one step."""
    clock, until = PhaseClock(device), time.perf_counter() + BREAKDOWN_SECONDS
    for step in range(steps):
        if step > 0 and time.perf_counter() > until:
            break
        with clock.step():
            run.step(clock)
    return clock.shares()


def _beside(problem: TrainingProblem, run: TrainingRun) -> Record:
    """Measure what needs separate steps: the parts of a step, and memory."""
    found: Record = {"shares": breakdown(run, problem.device)}
    if (peak := run.peak_bytes()) is not None:
        found["peak_bytes"] = peak
    return found


def _step_faults(run: TrainingRun) -> list[str]:
    last = run.last()
    if math.isfinite(last.loss) and math.isfinite(last.norm):
        return []
    return [f"step: loss {last.loss}, gradient norm {last.norm}, expected finite numbers"]


def _blame(record: Record, faults: list[str]) -> None:
    if faults:
        record |= {"right": False, "fault": "; ".join(faults)}


def _note(said: str, record: Record, lacking: dict[str, Record]) -> None:
    """Note a failure as a fault; a lack of memory is not one and makes the variant absent for this case."""
    if not lacks_memory(said):
        record |= {"right": False, "fault": said}
        return
    case, name = record["case"], record["variant"]
    lacking[name] = {"kind": "absent", "case": case, "variant": name, "reason": f"{case}: not enough memory"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

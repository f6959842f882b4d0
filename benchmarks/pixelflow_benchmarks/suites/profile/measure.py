"""A stage under torch.profiler: it is checked and warmed up, then timed without the profiler, then run once with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.timing import first_line, seconds_of, time_runs, wait_for
from pixelflow_benchmarks.suites.stages.measure import ends_of, figures, named, per_evaluation, stage_faults
from pixelflow_benchmarks.suites.stages.opponents import PUBLIC, SOLVER_OF, VARIANTS, Opponents
from pixelflow_benchmarks.suites.stages.problem import REFERENCE, Ran, StageProblem, StageRun
from pixelflow_benchmarks.suites.stages.runs import true_first_state
from pixelflow_engine import ranges

from .kernels import CLASSES, PASSES, Class, Row, busy_rows

PROFILED = tuple(name for name in VARIANTS if name != PUBLIC and SOLVER_OF.get(name, "euler") == "euler")
"""Variants that can be profiled: those with an Euler solver that run in this process, which excludes the published
code."""


def measure_profiles(
    problem: StageProblem,
    variants: Sequence[str],
    opponents: Opponents,
    ceilings: Ceilings,
    repeats: int,
    folder: Path,
) -> Iterator[Record]:
    """Profile one stage, one variant after the other.

    Args:
        problem: the stage, with Euler's solver.
        variants: names from :data:`PROFILED`; the reference is always run, to set the bound of the check.
        opponents: models of the variants.
        ceilings: measured ceilings of the device.
        repeats: number of runs without the profiler.
        folder: folder in which traces are written.

    Yields:
        For each variant a ``measurement`` as in ``bench stages``, with ``trace``, ``profiled_seconds`` (wall time of
        the profiled run) and ``busy_seconds``; then a ``class`` record for each class of kernels and a ``kernel``
        record for each kernel, whose seconds are those of the whole run. ``absent`` for variants that cannot run.
    """
    runs: dict[str, StageRun] = {}
    try:
        yield from _check_and_profile(problem, variants, runs, opponents, ceilings, repeats, folder)
    finally:
        for run in runs.values():
            run.close()
    for name, reason in opponents.absent.items():
        yield {"kind": "absent", "variant": name, "reason": reason}


def _check_and_profile(
    problem: StageProblem,
    variants: Sequence[str],
    runs: dict[str, StageRun],
    opponents: Opponents,
    ceilings: Ceilings,
    repeats: int,
    folder: Path,
) -> Iterator[Record]:
    """Yield the records of :func:`measure_profiles`, which closes the runs that were begun, by name in ``runs``."""
    truth = true_first_state(problem, opponents.weights, ends_of(problem))
    checks: dict[str, Ran] = {}
    failed: dict[str, str] = {}
    for name in dict.fromkeys((REFERENCE, *variants)):
        try:
            if (run := opponents.runs(name, problem)) is not None:
                runs[name] = run
                checks[name] = run.run(keep_first=True)
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            failed[name] = first_line(error)
    faults = stage_faults(problem, checks, truth)
    failed |= {name: "; ".join(found) for name, found in faults.items() if found}
    right = {name: run for name, run in runs.items() if name in variants and name not in failed}
    timed = time_runs({name: run.run for name, run in right.items()}, problem.device, repeats)
    failed |= timed.failed
    for name in variants:
        record = {"kind": "measurement", **named(problem), "variant": name}
        if name in failed:
            yield record | {"right": False, "fault": failed[name]}
        elif name in timed.timings:
            ran = checks[name]
            record |= {"right": True, "steps": ran.steps, "evaluations": ran.evaluations}
            record |= figures(problem, per_evaluation(problem, ran, timed.timings[name]), ceilings)
            yield from _profiled(record, right[name], problem, ceilings, folder)


def _profiled(
    record: Record, run: StageRun, problem: StageProblem, ceilings: Ceilings, folder: Path
) -> Iterator[Record]:
    file = folder / f"{record['variant'].replace('/', '-')}.trace.json.gz"
    wall, rows = trace_run(run, problem, file)
    found = {"trace": file.name, "profiled_seconds": wall, "busy_seconds": sum(row.seconds for row in rows)}
    yield record | found
    whose = {"case": record["case"], "variant": record["variant"]}
    floors = class_floors(problem, record["evaluations"], ceilings)
    yield from (whose | r for r in (*class_records(rows, wall, floors), *kernel_records(rows, floors)))


def trace_run(run: StageRun, problem: StageProblem, file: Path) -> tuple[float, list[Row]]:
    """Run a stage once under the profiler, with the engine's ranges.

    Args:
        run: the stage, compiled, captured and warmed up.
        problem: the problem that it runs.
        file: file for the trace, ``*.json.gz``.

    Returns:
        Wall seconds of the run, and what kept the device busy during it.
    """
    on_gpu = problem.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = partial(profile, activities=activities, acc_events=True)
    with profiler():  # the first use sets up the profiler, which takes long
        wait_for(problem.device)

    def stage() -> Ran:
        with ranges.named("stage", problem.stage):  # the cascade loop, which does this, does not run
            return run.run()

    with profiler() as active, ranges.ranges_shown():
        wall, _ = seconds_of(stage, problem.device)
    active.export_chrome_trace(str(file))
    return wall, busy_rows(active.key_averages(), on_gpu)


def class_floors(problem: StageProblem, evaluations: int, ceilings: Ceilings) -> dict[Class, float]:
    """Return the seconds of each class at the device's ceilings, for all evaluations of a run; copies have no floor."""
    return {
        "products": evaluations * ceilings.floor(problem.product_flops, 0),
        "attention": evaluations * ceilings.floor(problem.attention_flops, 0),
        "pointwise": evaluations * ceilings.floor(0, problem.pointwise_bytes),
    }


def class_records(rows: Sequence[Row], wall: float, floors: Mapping[Class, float]) -> Iterator[Record]:
    """Yield a record for each class: calls, seconds, share of the wall time, and the floor if there is one."""
    busy = sum(row.seconds for row in rows)
    for name in CLASSES:
        members = [row for row in rows if row.kind == name]
        # Kernels of several streams may overlap, so that their sum may exceed the wall time.
        seconds = max(0.0, wall - busy) if name == "idle" else sum(row.seconds for row in members)
        record = {
            "kind": "class",
            "class": name,
            "calls": sum(row.calls for row in members),
            "seconds": seconds,
            "share_of_wall": seconds / wall,
        }
        yield record | ({"floor_seconds": floors[name]} if name in floors else {})


def kernel_records(rows: Sequence[Row], floors: Mapping[Class, float]) -> Iterator[Record]:
    """Yield a record for each kernel, longest first; with a floor if the kernel's part of its class is known."""
    busy = sum(row.seconds for row in rows)
    attention = [row for row in rows if row.kind == "attention"]
    for row in rows:
        record = {
            "kind": "kernel",
            "name": row.name,
            "class": row.kind,
            "calls": row.calls,
            "seconds": row.seconds,
            "share_of_busy": row.seconds / busy,
            "mean_seconds": row.seconds / row.calls,
        }
        if row.name in PASSES:
            record["floor_seconds"] = PASSES[row.name] * floors["pointwise"]
        elif row in attention[:1]:  # one kernel does all of attention; others of that class take little time
            record["floor_seconds"] = floors["attention"]
        yield record

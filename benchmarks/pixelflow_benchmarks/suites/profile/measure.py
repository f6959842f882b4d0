"""A stage under torch.profiler: checked and warm first, then timed without the profiler, then once with it."""

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
"""Who can be profiled: the published code runs in a process of its own, where no profiler of ours looks."""


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
        problem: the stage, Euler's steps.
        variants: of :data:`PROFILED`; the reference runs anyway, to set the bound of the check.
        opponents: their models.
        ceilings: of the device.
        repeats: runs without the profiler.
        folder: where traces are written.

    Yields:
        for each variant a ``measurement``, as ``bench stages`` has it, with ``trace``, ``profiled_seconds`` (wall time
        of the profiled run) and ``busy_seconds``; then a ``class`` for each class of kernels and a ``kernel`` for each
        of them. Seconds of these two are of the whole run. ``absent`` for who cannot be had.
    """
    truth = true_first_state(problem, opponents.weights, ends_of(problem))
    runs: dict[str, StageRun] = {}
    checks: dict[str, Ran] = {}
    failed: dict[str, str] = {}
    for name in dict.fromkeys((REFERENCE, *variants)):
        try:
            if (run := opponents.runs(name, problem)) is not None:
                checks[name] = run.run(keep_first=True)
                runs[name] = run
        except Exception as error:  # a compiler fails in many ways; the others are measured all the same
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
    for run in runs.values():
        run.close()
    for name, reason in opponents.absent.items():
        yield {"kind": "absent", "variant": name, "reason": reason}


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
    """Run it once under the profiler, with the engine's ranges.

    Args:
        run: the stage, compiled, captured and warm.
        problem: what it runs.
        file: where the trace goes, ``*.json.gz``.

    Returns:
        wall seconds of the run, and what kept the device busy meanwhile.
    """
    on_gpu = problem.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    profiler = partial(profile, activities=activities, acc_events=True)
    with profiler():  # what it needs is set up when it is first used, which takes long
        wait_for(problem.device)

    def stage() -> Ran:
        with ranges.named("stage", problem.stage):  # the cascade names its stages; here there is one, and no cascade
            return run.run()

    with profiler() as active, ranges.ranges_shown():
        wall, _ = seconds_of(stage, problem.device)
    active.export_chrome_trace(str(file))
    return wall, busy_rows(active.key_averages(), on_gpu)


def class_floors(problem: StageProblem, evaluations: int, ceilings: Ceilings) -> dict[Class, float]:
    """Seconds that each class takes at the device's ceilings, for all evaluations of a run; copies need not be."""
    return {
        "products": evaluations * ceilings.floor(problem.product_flops, 0),
        "attention": evaluations * ceilings.floor(problem.attention_flops, 0),
        "pointwise": evaluations * ceilings.floor(0, problem.pointwise_bytes),
    }


def class_records(rows: Sequence[Row], wall: float, floors: Mapping[Class, float]) -> Iterator[Record]:
    """A record for each class: calls, seconds, their share of the wall time, and its floor where there is one."""
    busy = sum(row.seconds for row in rows)
    for name in CLASSES:
        members = [row for row in rows if row.kind == name]
        # Kernels of several streams may run at once: then nothing is idle.
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
    """A record for each kernel, longest first; its floor where the kernel's part of its class is known."""
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
        elif row in attention[:1]:  # all of attention is in one kernel, what else is called so (an operator) is little
            record["floor_seconds"] = floors["attention"]
        yield record

"""Measurement of whole images by every variant: the images are checked first, then timed in interleaved rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.energy import joules_of
from pixelflow_benchmarks.harness.profiling import cpu_profile
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
from pixelflow_engine.errors import BackendUnavailableError

from .opponents import EXACT, LOOP, OWN_NOISE, PUBLIC, REFERENCE, Call, ImageOpponents, ImageProblem


def measure_images(
    problem: ImageProblem,
    opponents: ImageOpponents,
    names: tuple[str, ...],
    ceilings: Ceilings,
    repeats: int,
    deadline: float = math.inf,
) -> Iterator[Record]:
    """Check every variant, then time the right ones.

    Args:
        problem: the images to make.
        opponents: models of all variants.
        names: names of the variants; the reference is always added.
        ceilings: measured ceilings of the device.
        repeats: number of rounds.
        deadline: time after which no variant and no round is begun and no energy measured, on the clock of
            ``time.perf_counter``; variants that have begun are timed for at least one round.

    Yields:
        A ``measurement`` of each variant, in seconds per image of the batch; its ``first_seconds`` are those of the
        whole first call, compilation and capture included. ``absent`` once for a variant that cannot run at all, and
        with its ``case`` for one that cannot run this problem. ``skipped`` for what there was no time left for.
    """
    if time.perf_counter() > deadline:
        yield {"kind": "skipped", "case": problem.case, "reason": "no time was left"}
        return
    calls: dict[str, Call] = {}
    for name in dict.fromkeys((REFERENCE, *names)):
        if name in opponents.absent:
            continue
        try:
            calls[name] = opponents.call(name, problem)
        except (BackendUnavailableError, RuntimeError, ValueError) as error:
            record: Record = {"kind": "absent", "variant": name, "reason": first_line(error)}
            if isinstance(error, BackendUnavailableError) or name == PUBLIC:  # in no case, not only in this one
                opponents.absent[name] = record["reason"]
            else:
                record["case"] = problem.case
            yield record
    yield from check_and_time(problem, calls, partial(opponents.truth, problem), ceilings, repeats, deadline)


def check_and_time(
    problem: ImageProblem,
    calls: Mapping[str, Call],
    truth: Call,
    ceilings: Ceilings,
    repeats: int,
    deadline: float = math.inf,
) -> Iterator[Record]:
    """Yield the ``measurement`` of each call; see :func:`measure_images`."""
    device = problem.device
    records: dict[str, Record] = {}
    images: dict[str, Tensor] = {}
    for name, call in calls.items():
        record: Record = {"kind": "measurement", "case": problem.case, "variant": name, "right": True}
        record |= {"batch": problem.batch, "steps": problem.steps}
        before = graphs_compiled()
        if images and time.perf_counter() > deadline:
            yield {"kind": "skipped", "case": problem.case, "variant": name, "reason": "no time was left"}
            continue
        try:
            record["first_seconds"], images[name] = seconds_of(call, device)
            record["graphs_compiled"] = graphs_compiled() - before
        except Exception as error:  # a compiler can fail in many ways; the other variants are still measured
            record |= {"right": False, "fault": first_line(error)}
        records[name] = record
    try:
        faults = wrong(images, truth())
    except (RuntimeError, MemoryError) as error:  # what was not checked gets no time, but the run continues
        if not lacks_memory(first_line(error)):
            raise
        faults = dict.fromkeys(images, f"not compared with float64, {first_line(error)}")
    for name, fault in faults.items():
        records[name] |= {"right": False, "fault": fault}
    right = {name: calls[name] for name, record in records.items() if record["right"]}
    timed = time_runs(right, device, repeats, end_of_turns(deadline))
    for name, fault in timed.failed.items():
        records[name] |= {"right": False, "fault": fault}
    for name, record in records.items():  # each as soon as it is complete: an interrupted run keeps those before
        if name in timed.timings:
            record |= figures(problem, timed.timings[name], ceilings)
            others = {other: timed.timings[other] for other in (REFERENCE, LOOP, PUBLIC) if other in timed.timings}
            record["times"] = {other: timed.timings[name].times_faster_than(its) for other, its in others.items()}
            if time.perf_counter() < deadline and (found := joules_of(right[name], device)):
                record |= {**found, "joules": found["joules"] / problem.batch}
            # A profiled run takes longer than an unprofiled one. The loop over blocks of noise would add half a million
            # operations, none of them the model's, and the published code runs in another process.
            if device.type == "cpu" and name not in (LOOP, PUBLIC) and time.perf_counter() < deadline:
                record["shares"] = shares(right[name])
        yield record


def wrong(images: Mapping[str, Tensor], truth: Tensor) -> dict[str, str]:
    """Return what is wrong with each variant's images; variants without a fault are left out.

    On a CPU the exact engine and both references must have the same bits. Every other variant that draws the
    reference's noise may be twice as far from float64 as the reference, plus two float32 roundings, as root mean
    squares. A variant with its own noise makes other images, which only have to be finite; the same engine is checked
    with the reference's noise. This also holds for the published code on a GPU, where it begins with other noise; it is
    checked on a CPU.
    """
    if REFERENCE not in images:
        return dict.fromkeys(images, "nothing to compare with: the reference failed")
    found = {}
    expected = images[REFERENCE]
    bound = 2 * distance(expected, truth) + torch.finfo(torch.float32).eps
    for name, got in images.items():
        if name == OWN_NOISE or (name == PUBLIC and truth.is_cuda):
            if not bool(got.isfinite().all()):
                found[name] = "not finite"
        elif name in (LOOP, EXACT) and got.device.type == "cpu":
            if not torch.equal(got, expected):
                found[name] = f"{int((got != expected).sum())} of {got.numel()} values differ from the reference"
        elif not (error := distance(got, truth)) <= bound:
            found[name] = f"error {error:.3e}, bound {bound:.3e}"
    return found


def distance(images: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the difference."""
    return (images.double() - truth.to(images.device)).square().mean().sqrt().item()


def figures(problem: ImageProblem, timing: Timing, ceilings: Ceilings) -> Record:
    """Return seconds per image, images per second, and the floor at the device's ceilings as a share of the time."""
    one = Timing(tuple(seconds / problem.batch for seconds in timing.turns))
    floor = ceilings.floor(problem.flops, problem.pointwise_bytes) / problem.batch
    return {
        "per": "image",
        "seconds": one.spread(),
        "images_per_second": 1 / one.median,
        "flops": problem.flops / problem.batch,
        "floor_seconds": floor,
        "fraction_of_floor": floor / one.median,
    }


def shares(call: Callable[[], object]) -> dict[str, float]:
    """Return the shares of attention and of matrix products in the time of one run on a CPU."""
    with cpu_profile() as found:
        call()
    times = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    total = sum(times.values())
    products = ("aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise", "mkl::_mkl_linear")
    attention = sum(value for key, value in times.items() if "dot_product" in key)
    return {"attention": attention / total, "products": sum(times.get(key, 0) for key in products) / total}

"""Measurement of kernels: check, then time, then compare with the device's ceilings.

A variant with a wrong result is not given a speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator

import torch

from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.harness.timing import Timing, time_calls

from .case import Case, faults

EAGER = "eager"


def measure(
    cases: Iterable[Case], ceilings: Ceilings, device: torch.device, repeats: int, deadline: float = math.inf
) -> Iterator[Record]:
    """Yield a record per case and variant, as soon as the case is measured.

    Args:
        cases: cases, the most important first.
        ceilings: measured ceilings of the device.
        device: device to run on.
        repeats: measurements of each variant.
        deadline: time after which no case is begun, on the clock of ``time.perf_counter``; at least one case is
            measured.

    Yields:
        A ``measurement`` of each variant; if it is right, with ``gigabytes_per_second``, ``fraction_of_copy`` and, for
        cases with matrix products, ``teraflops`` and ``fraction_of_product``. ``absent``, with its ``case``, for a
        variant that cannot run. A single ``skipped``, without a case, if the deadline came first.
    """
    for number, case in enumerate(cases):
        if number > 0 and time.perf_counter() > deadline:
            yield {"kind": "skipped", "reason": f"no time was left after {number} cases"}
            return
        wrong = faults(case)
        right = {name: call for name, call in case.variants.items() if not wrong[name]}
        failed: dict[str, str] = {}
        timings = time_calls(right, device, repeats, failed) if right else {}
        wrong |= {name: [fault] for name, fault in failed.items()}
        for name in case.variants:
            record = {"kind": "measurement", "case": case.name, "variant": name, "right": not wrong[name]}
            if wrong[name]:
                yield record | {"fault": "; ".join(wrong[name])}
                continue
            record |= figures(case, timings[name], ceilings)
            if EAGER in timings:
                record["times"] = {EAGER: timings[name].times_faster_than(timings[EAGER])}
            yield record
        for name, reason in case.absent.items():
            yield {"kind": "absent", "case": case.name, "variant": name, "reason": reason}


def figures(case: Case, timing: Timing, ceilings: Ceilings) -> Record:
    """Return the rates of one timing, from the case's declared bytes and products, not from what a variant really does.

    The floor is the larger of the two times, since a kernel computes while it reads.
    """
    bytes_share = case.bytes_moved / timing.median / ceilings.bytes_per_second
    flops_share = case.flops / timing.median / ceilings.flops_per_second
    found: Record = {
        "per": "call",
        "seconds": timing.spread(),
        "captured": timing.captured,
        "bytes": case.bytes_moved,
        "flops": case.flops,
        "gigabytes_per_second": case.bytes_moved / timing.median / 1e9,
        "fraction_of_copy": bytes_share,
        "floor_seconds": max(bytes_share, flops_share) * timing.median,
        "fraction_of_floor": max(bytes_share, flops_share),
    }
    if case.flops:
        found["teraflops"] = case.flops / timing.median / 1e12
        found["fraction_of_product"] = flops_share
    return found

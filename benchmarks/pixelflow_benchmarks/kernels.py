"""Measure kernels: check, then time, then compare with the device's ceilings.

Nothing that computes a wrong result gets a speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from .ceilings import Ceilings
from .kernel_cases.case import Case, faults
from .timing import Timing, time_calls


def measure(cases: Iterable[Case], ceilings: Ceilings, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a record per case and variant, as soon as the case is measured.

    Yields:
        records: ``kind`` ``"kernel"``, ``case``, ``variant``, ``right``. Where that is false: ``faults``. Where it is
        true seconds (``median``, ``low``, ``high``), ``gigabytes_per_second``, ``fraction_of_copy`` and, for cases with
        matrix products, ``teraflops``, ``fraction_of_product``. A variant that is not there has ``absent``, the reason.
    """
    for case in cases:
        wrong = faults(case)
        right = {name: call for name, call in case.variants.items() if not wrong[name]}
        timings = time_calls(right, device, rounds) if right else {}
        for name in case.variants:
            record = {"kind": "kernel", "case": case.name, "variant": name, "right": not wrong[name]}
            if wrong[name]:
                yield record | {"faults": wrong[name]}
            else:
                yield record | figures(case, timings[name], ceilings)
        for name, reason in case.absent.items():
            yield {"kind": "kernel", "case": case.name, "variant": name, "absent": reason}


def figures(case: Case, timing: Timing, ceilings: Ceilings) -> dict[str, Any]:
    """Rates of one timing; the denominators are the least bytes and the products, not what a variant really does."""
    found = asdict(timing)
    found["gigabytes_per_second"] = case.bytes_moved / timing.median / 1e9
    found["fraction_of_copy"] = case.bytes_moved / timing.median / ceilings.bytes_per_second
    if case.flops:
        found["teraflops"] = case.flops / timing.median / 1e12
        found["fraction_of_product"] = case.flops / timing.median / ceilings.flops_per_second
    return found

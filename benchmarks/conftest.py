"""What the entry points for pytest-benchmark share: ``pytest benchmarks --benchmark-only``.

On a GPU, where there is one, at the published model's sizes; else on the CPU at tiny ones: the commands' own would take
many minutes there. Nothing wrong gets a time: a variant whose output fails its check fails its benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pytest
import torch
import torch._dynamo

from pixelflow_benchmarks.commands.options import place_of
from pixelflow_benchmarks.harness.timing import REPEATS, wait_for

WARM_UP = 3


class Time(Protocol):
    """See :func:`time_right`."""

    def __call__(self, case: str, variant: str, call: Callable[[], object], faults: Sequence[str], **more: Any) -> None:
        """Fail where there are faults, else time the call."""


@pytest.fixture
def time_right(benchmark: Any) -> Time:
    """Times a call that is right, until the device is done; variants of a case are one group of the report."""
    device = place_of("auto")

    def time(case: str, variant: str, call: Callable[[], object], faults: Sequence[str], **more: Any) -> None:
        if faults:
            pytest.fail(f"{case}, {variant}: {'; '.join(faults)}", pytrace=False)

        def run() -> None:
            call()
            wait_for(device)

        benchmark.group = case
        benchmark.extra_info |= {"case": case, "variant": variant, "device": str(device), **more}
        wait_for(device)
        benchmark.pedantic(run, rounds=REPEATS, warmup_rounds=WARM_UP)

    return time


@pytest.fixture(autouse=True, scope="session")
def many_models() -> Iterator[None]:
    """Many models of one class are compiled here, a sampling has one: its limit would be reached too soon."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield

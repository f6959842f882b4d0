"""Fixtures of the pytest-benchmark entry points: ``pytest benchmarks --benchmark-only``.

They run on a GPU if there is one, at the published model's sizes; otherwise on the CPU at tiny sizes, because the
commands' own would take many minutes there. A variant whose output fails its check fails its benchmark and gets no
time.
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
    """Type of the fixture :func:`time_right`."""

    def __call__(self, case: str, variant: str, call: Callable[[], object], faults: Sequence[str], **more: Any) -> None:
        """Fail if there are faults, otherwise time the call."""


@pytest.fixture
def time_right(benchmark: Any) -> Time:
    """Return a function that times a correct call until the device is done; a case's variants form one report group."""
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
    """Raise Dynamo's limit: many models of one class are compiled here, whereas sampling compiles only one."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield

"""Energy that a GPU uses, from its own counter.

The counter moves in steps, some tens of milliseconds apart, and is read late by as much. A figure is therefore taken
from one step that was seen to the next that was seen after the window: both are late alike, and what was run between
them is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .environment import nvml_handle, state
from .timing import Call, wait_for

WINDOW = 2.0
"""Seconds of running that a figure is taken over, at least."""
PATIENCE = 2.0
"""Seconds beyond the window that are waited for a step of the counter: one that stands still says nothing."""


def joules_of(run: Call, device: torch.device, window: float = WINDOW) -> dict[str, Any]:
    """Run again and again for a while.

    Args:
        run: correct and warm; it may return before the device is done.
        device: a GPU; for a CPU there is nothing to say.
        window: seconds, at least.

    Returns:
        ``joules`` of one run, ``watts``, ``energy_seconds``, and ``at_work``: the device's state while a run was under
        way. Nothing where the board does not count; then nothing is run, either.
    """
    with nvml_handle(device) as found:
        if found is None:
            return {}
        nvml, handle = found

        def millijoules() -> int | None:
            try:
                return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            except nvml.NVMLError:
                return None

        return _counted(run, device, window, millijoules)


def _counted(run: Call, device: torch.device, window: float, millijoules: Callable[[], int | None]) -> dict[str, Any]:
    wait_for(device)
    at_work: dict[float, dict[str, Any]] = {}  # at first and, of shorter runs, in the middle
    runs, seen = 0, millijoules()
    began = since = time.perf_counter()
    first = None if seen is None else (began, seen, 0)
    stepped = False  # the first step that is seen begins the figure, unless one run is longer than it has to be
    while first is not None:
        run()
        passed = time.perf_counter() - began
        if not at_work or (len(at_work) == 1 and passed > window / 2):
            at_work[passed] = state(device)
        wait_for(device)
        runs, now, count = runs + 1, time.perf_counter(), millijoules()
        if count is None or (count == seen and now - since > window + PATIENCE):
            break
        if count == seen:
            continue
        seen, since = count, now
        if (seconds := now - first[0]) >= window and (stepped or runs == 1):
            joules = (count - first[1]) / 1000
            found = {"joules": joules / (runs - first[2]), "watts": joules / seconds, "energy_seconds": seconds}
            return found | {"at_work": at_work[max(at_work)]}
        if not stepped:
            first, stepped = (now, count, runs), True
    return {}

"""Energy used by a GPU, from the board's own counter.

The counter advances in steps some tens of milliseconds apart and is read with a delay of about as much. A figure is
therefore taken from one observed step to the next step observed after the window: both readings are delayed alike, and
the number of runs between them is known.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .environment import nvml_handle, state
from .timing import Call, wait_for

WINDOW = 2.0
"""Minimum duration in seconds over which energy is measured."""
PATIENCE = 2.0
"""Seconds to wait for the counter's next step beyond the window; a counter that has stopped yields no figure."""


def joules_of(run: Call, device: torch.device, window: float = WINDOW) -> dict[str, Any]:
    """Measure the energy of a run by repeating it for at least ``window`` seconds.

    Args:
        run: correct and warm; it may return before the device is done.
        device: a GPU; on a CPU the result is empty.
        window: minimum duration in seconds.

    Returns:
        ``joules`` of one run, ``watts``, ``energy_seconds``, and ``at_work``: the device's state in mid-window. Empty
        if the board has no counter, in which case nothing is run, or if the counter stops.
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
    at_work: list[dict[str, Any]] = []
    # From beside, because a run may return only when the device is idle again.
    look = threading.Timer(window / 2, lambda: at_work.append(state(device)))
    look.start()
    try:
        found = _over_window(run, device, window, millijoules)
    finally:
        look.cancel()
        look.join()
    return found | ({"at_work": at_work[0]} if found and at_work else {})


def _over_window(
    run: Call, device: torch.device, window: float, millijoules: Callable[[], int | None]
) -> dict[str, Any]:
    runs, seen = 0, millijoules()
    began = since = time.perf_counter()
    first = None if seen is None else (began, seen, 0)
    stepped = False  # the figure begins at the first observed step, unless a single run lasts long enough by itself
    while first is not None:
        run()
        wait_for(device)
        runs, now, count = runs + 1, time.perf_counter(), millijoules()
        if count is None or (count == seen and now - since > window + PATIENCE):
            break
        if count == seen:
            continue
        seen, since = count, now
        if (seconds := now - first[0]) >= window and (stepped or runs == 1):
            joules = (count - first[1]) / 1000
            return {"joules": joules / (runs - first[2]), "watts": joules / seconds, "energy_seconds": seconds}
        if not stepped:
            first, stepped = (now, count, runs), True
    return {}

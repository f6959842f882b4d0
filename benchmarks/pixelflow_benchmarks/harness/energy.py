"""Energy that a GPU uses, from its own counter."""

from __future__ import annotations

import time

import torch

from .environment import nvml_handle
from .timing import Call, wait_for

WINDOW = 2.0
"""Seconds of running that a figure is taken over: the counter moves in steps of some ten milliseconds."""


def millijoules(device: torch.device) -> int | None:
    """Since the driver was loaded; None for a CPU and for a board that does not count."""
    with nvml_handle(device) as found:
        if found is None:
            return None
        nvml, handle = found
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except nvml.NVMLError:
            return None


def joules_of(run: Call, device: torch.device, window: float = WINDOW) -> dict[str, float]:
    """Run again and again for a while: ``joules`` of one run, ``watts``, ``energy_seconds``.

    Nothing is run, and nothing said, where the board does not count.
    """
    wait_for(device)
    if (before := millijoules(device)) is None:
        return {}
    began, times = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < window:
        run()
        wait_for(device)
        times += 1
    after = millijoules(device)
    assert after is not None
    joules = (after - before) / 1000
    return {"joules": joules / times, "watts": joules / seconds, "energy_seconds": seconds}

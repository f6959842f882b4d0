"""Energy that a GPU has used, from its own counter."""

from __future__ import annotations

import torch

from .environment import nvml_handle


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

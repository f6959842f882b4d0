"""What a measurement depends on: the machine, its clocks, the versions, the code's commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions and hardware as text: python, torch, numpy, machine, threads; for a GPU also its name and driver."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    if device is None or device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
        "triton": metadata.version("triton"),
        "commit": commit(),
    }
    with _nvml() as nvml:
        if nvml is not None:
            found["driver"] = nvml.nvmlSystemGetDriverVersion()
    return found


def clocks(device: torch.device) -> dict[str, int]:
    """MHz of multiprocessors and memory, and degrees Celsius, now; empty where the driver does not tell."""
    with nvml_handle(device) as found:
        if found is None:
            return {}
        nvml, handle = found
        return {
            "sm_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }


@contextlib.contextmanager
def nvml_handle(device: torch.device) -> Iterator[tuple[Any, Any] | None]:
    """The NVML bindings and their handle of a CUDA device; None for a CPU, and where there is no driver."""
    with _nvml() as nvml:
        if nvml is None or device.type != "cuda":
            yield None
        else:
            uuid = torch.cuda.get_device_properties(device).uuid
            yield nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def commit() -> str:
    """The commit of the checkout that this file is in, marked where files differ from it; ``unknown`` elsewhere."""
    folder = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML bindings, initialised; None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    except pynvml.NVMLError:
        return
    finally:
        pynvml.nvmlShutdown()

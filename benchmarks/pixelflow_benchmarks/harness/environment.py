"""The conditions that a measurement depends on: machine, device state, library versions and commit."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")


def environment(device: torch.device = CPU) -> dict[str, str]:
    """Return commit, versions and hardware as text: python, torch, numpy, triton, processor, threads, GPU, driver."""
    found = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
    }
    with _nvml() as nvml:
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                found["driver"] = nvml.nvmlSystemGetDriverVersion()
    return found


def device_name(device: torch.device) -> str:
    """Return the device's name in the form of a folder name: ``nvidia-h100-80gb-hbm3``, ``amd-epyc-7b13``."""
    name = torch.cuda.get_device_properties(device).name if device.type == "cuda" else processor()
    words = "".join(c if c.isalnum() else " " for c in name.lower().replace("(r)", "").replace("(tm)", "")).split()
    return "-".join(words) or "unknown"


def state(device: torch.device) -> dict[str, Any]:
    """Return the device's current state: clocks in MHz, degrees Celsius, watts and their limit, throttling reasons.

    For a CPU it is the system's load. Readings that the driver does not support are left out.
    """
    if device.type != "cuda":
        return {"load": os.getloadavg()[0]}
    with nvml_handle(device) as found:
        if found is None:
            return {}
        nvml, handle = found
        readings: dict[str, Callable[[], Any]] = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "watts_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            "held_down_by": lambda: _holding_down(nvml, handle),
        }
        told = {}
        for name, read in readings.items():
            with contextlib.suppress(nvml.NVMLError):
                told[name] = read()
        return told


def _holding_down(nvml: Any, handle: Any) -> list[str]:
    """Return why clocks are below their maximum, such as ``GpuIdle``; a bit without a name is given as a number."""
    try:
        bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except nvml.NVMLError:  # an older driver has the call under its former name only
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    names: dict[int, str] = {}
    for prefix in ("nvmlClocksEventReason", "nvmlClocksThrottleReason"):  # some reasons have the former name only
        for name in sorted(name for name in dir(nvml) if name.startswith(prefix)):
            names.setdefault(getattr(nvml, name), name.removeprefix(prefix))
    found = (1 << place for place in range(bits.bit_length()) if bits >> place & 1)
    return [names.get(bit, hex(bit)) for bit in found]


@contextlib.contextmanager
def nvml_handle(device: torch.device) -> Iterator[tuple[Any, Any] | None]:
    """Yield the NVML bindings and the handle of a CUDA device.

    Yields None for a CPU, without a driver, and for a device that NVML does not know by its UUID, such as a MIG
    partition.
    """
    with _nvml() as nvml:
        if nvml is None or device.type != "cuda":
            yield None
            return
        found = None
        with contextlib.suppress(nvml.NVMLError):
            uuid = torch.cuda.get_device_properties(device).uuid
            found = nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        yield found


def commit() -> str:
    """Return the checkout's commit, with ``+changes`` if tracked files are modified; ``unknown`` outside one."""
    folder = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    return "unknown"


def processor() -> str:
    """Return the CPU's model name, or what :mod:`platform` reports where the system does not provide it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """Yield the initialized NVML bindings; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()

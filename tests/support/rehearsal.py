"""Plugin for pytest: tests for GPUs run on the simulated device (``make rehearse``).

``PIXELFLOW_ARCH`` chooses its architecture (90). A test that takes longer than ``PIXELFLOW_REHEARSE_SECONDS`` (60) is
given up and counts as skipped: the emulator is slower than a device by many orders of magnitude. With
``PIXELFLOW_REHEARSE_KERNELS=plain`` nothing is emulated: the project's operations are computed in plain PyTorch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest
import torch

from pixelflow_benchmarks.harness import ceilings, timing

from .simulation import SimulatedDevice

ARCH = int(os.environ.get("PIXELFLOW_ARCH", "90"))
KERNELS = os.environ.get("PIXELFLOW_REHEARSE_KERNELS", "emulated")
SECONDS = int(os.environ.get("PIXELFLOW_REHEARSE_SECONDS", "60"))

torch.cuda.is_available = lambda: True  # asked while tests are collected


NOT_SIMULATED = {
    "test_without_sizes_the_others_do_matter": "a CPU divides products otherwise",
    "test_two_threads_on_two_streams": "the modes of torch are those of one thread",
    "test_candidates_are_compiled_in_threads_captured_and_timed": "the modes of torch are those of one thread",
    "test_halving_rounds_as_torch_does_here": "a CPU adds in another order",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := NOT_SIMULATED.get(getattr(item, "originalname", ""))) is not None:
            item.add_marker(pytest.mark.skip(reason=f"not simulated: {reason}"))


@pytest.fixture(scope="session")
def _device() -> SimulatedDevice:
    return SimulatedDevice(ARCH, KERNELS == "emulated")


@pytest.fixture(autouse=True)
def _quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks measure nothing here: a GPU's ceilings and repetitions would take hours."""
    monkeypatch.setattr(ceilings, "GPU_SIZES", (2**16, 64))
    monkeypatch.setattr(timing, "UNROLL", 2)
    monkeypatch.setattr(timing, "TURNS_SECONDS", 2.0)


@pytest.fixture(autouse=True)
def _rehearsed(_device: SimulatedDevice) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        pytest.skip(f"takes longer than {SECONDS} s on the simulated device")

    with _device.active():
        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

"""Transfers between host and device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Copy to page-locked memory, from which a CUDA device reads asynchronously; for other devices, return as is."""
    on_host = values.device.type == "cpu" and type(values) is Tensor  # fakes have no memory
    return values.pin_memory() if device.type == "cuda" and on_host else values


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, ordered with the caller's stream; the host does not wait. A no-op for what is there already.

    PyTorch does not reuse the page-locked memory before the copy is done.
    """
    return pinned(values, device).to(device, non_blocking=True)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy Python numbers to a device as a tensor ``[n]``; the host does not wait."""
    return uploaded(torch.tensor(values, dtype=dtype, device="cpu"), device)


class Download:
    """A copy of a device's values on its way to the host.

    Only :meth:`wait` waits, and not for what was launched after the download began.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values.detach().to("cpu", non_blocking=True, copy=True)  # page-locked, if it comes from CUDA
        self._done = torch.cuda.Event() if values.is_cuda else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """Return the values on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._host

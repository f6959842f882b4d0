"""Values on their way from the host to a device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """In page-locked memory, from which a CUDA device reads by itself; elsewhere the tensor as it is."""
    return values.pin_memory() if device.type == "cuda" and type(values) is Tensor else values  # fakes have no memory


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """On the device, in the order of the caller's stream; the host goes on at once.

    PyTorch gives page-locked memory to nobody else before the copy is done.
    """
    return pinned(values, device).to(device, non_blocking=True)


def numbers(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[n]`` numbers of Python's on the device, likewise."""
    return uploaded(torch.tensor(values, dtype=dtype, device="cpu"), device)

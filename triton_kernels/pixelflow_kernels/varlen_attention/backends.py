"""Choice of the attention backend, and the reasons why a backend cannot run."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from pixelflow_kernels.errors import BackendUnavailableError
from pixelflow_kernels.registration import interpreting

from . import flash

NAMES = ("triton", "flash", "torch")


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot take tensors of this device and dtype, or None if it can.

    Args:
        name: ``triton``, ``flash`` or ``torch``.
        device: device of the tensors.
        dtype: dtype of the tensors.
    """
    if name == "torch":
        return None
    if name == "triton" and device.type == "cpu" and interpreting():
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and the tensors are on {device}"
    if name == "flash":
        return flash.why_not(dtype)
    if dtype == torch.float64:
        return "its kernels take no float64"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def choose(name: str, x: Tensor) -> str:
    """Resolve a backend name; ``auto`` is ``triton`` on CUDA (``torch`` for float64) and ``torch`` elsewhere.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailableError: the backend cannot run here; there is no fallback.
    """
    if name == "auto":
        return "torch" if x.device.type != "cuda" or x.dtype == torch.float64 else "triton"
    if name not in NAMES:
        raise ValueError(f"backend: got {name!r}, expected one of auto, {', '.join(NAMES)}")
    if reason := why_not(name, x.device, x.dtype):
        raise BackendUnavailableError(f"backend: {name!r} cannot run: {reason}")
    return name

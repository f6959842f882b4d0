"""Selection of the implementation of the operations, with the reason why one can or cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pixelflow_kernels.registration import interpreting
from pixelflow_kernels.varlen_attention import backends as attention_backends

from .errors import BackendUnavailableError
from .fused import FusedOperations
from .operations import Operations, PlainOperations
from .traceable import KnownPackOperations, TraceableOperations

BackendName = Literal["torch", "triton", "flash"]
NAMES: tuple[BackendName, ...] = ("torch", "triton", "flash")


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation of the operations.

    Attributes:
        name: the name by which it is requested.
        available: whether it can run.
        reason: why, or why not.
    """

    name: BackendName
    available: bool
    reason: str

    def operations(self, compiled: bool, known_packs: bool = False) -> Operations:
        """Create its operations.

        Args:
            compiled: whether they will be compiled.
            known_packs: whether packs have few shapes, so that each may have its own graph.
        """
        if self.name != "torch":
            return FusedOperations(self.name)
        if not compiled:
            return PlainOperations()
        return KnownPackOperations() if known_packs else TraceableOperations()


def backends(device: torch.device, dtype: torch.dtype, head_dim: int = 8) -> tuple[Backend, ...]:
    """All backends, examined for a model of this dtype and head dim on this device."""
    return tuple(_examine(name, device, dtype, head_dim) for name in NAMES)


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 8) -> Backend:
    """Select a backend by name; ``auto`` is ``triton`` on CUDA if it can run there, otherwise ``torch``.

    Raises:
        ValueError: the name is unknown.
        BackendUnavailableError: the named backend cannot run there; no other one is substituted.
    """
    known = {backend.name: backend for backend in backends(device, dtype, head_dim)}
    if name == "auto":
        return known["triton" if device.type == "cuda" and known["triton"].available else "torch"]
    for backend in known.values():
        if backend.name == name:
            if not backend.available:
                raise BackendUnavailableError(f"backend: {name!r} cannot run: {backend.reason}")
            return backend
    raise ValueError(f"backend: got {name!r}, expected one of auto, {', '.join(NAMES)}")


def _examine(name: BackendName, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    if name == "torch":
        return Backend(name, True, f"PyTorch {torch.__version__}, on any device")
    why_not = attention_backends.why_not(name, device, dtype)
    if why_not is None and head_dim % 8 != 0:
        why_not = f"its kernels take head dims that are multiples of 8, and the model's is {head_dim}"
    if why_not is not None:
        return Backend(name, False, why_not)
    attention = "attention by FlashAttention, the rest by our" if name == "flash" else "our"
    return Backend(name, True, f"{attention} Triton kernels{', interpreted' if interpreting() else ''}")

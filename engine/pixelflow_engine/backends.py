"""Which implementation of the operations an engine runs, and why."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from .errors import BackendUnavailableError

BackendName = Literal["torch", "triton", "flash"]


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation of the operations.

    Attributes:
        name: what a caller asks for.
        available: whether this version can run it here.
        reason: why, or why not.
    """

    name: BackendName
    available: bool
    reason: str


def backends() -> tuple[Backend, ...]:
    """Every backend and whether it can run."""
    package = "is installed" if importlib.util.find_spec("flash_attn") else "is not installed"
    return (
        Backend("torch", True, f"PyTorch {torch.__version__}, on any device"),
        Backend("triton", False, "this version of the engine does not call the fused kernels yet"),
        Backend("flash", False, f"this version does not call FlashAttention (flash_attn {package})"),
    )


def choose(name: str) -> Backend:
    """The backend of that name; ``auto`` is ``torch`` as long as there is no faster one.

    Raises:
        ValueError: no such backend.
        BackendUnavailableError: it cannot run here; nothing else is taken in its place.
    """
    known: dict[str, Backend] = {backend.name: backend for backend in backends()}
    if name == "auto":
        return known["torch"]
    if name not in known:
        raise ValueError(f"backend: got {name!r}, expected one of auto, {', '.join(known)}")
    backend = known[name]
    if not backend.available:
        raise BackendUnavailableError(f"backend: {name!r} cannot run: {backend.reason}")
    return backend

"""Registration of an operation's kernel launches: for CUDA, and for CPU under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch._library.custom_ops import CustomOpDef

Launch = TypeVar("Launch", bound=Callable[..., Any])


def interpreting() -> bool:
    """Return whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``); Triton reads this on import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched_by(operation: CustomOpDef) -> Callable[[Launch], Launch]:
    """Decorator that registers a function as the operation's CUDA implementation, which launches its kernels.

    Under Triton's interpreter the function is registered for the CPU as well; otherwise the CPU runs the operation's
    plain PyTorch implementation.
    """

    def register(launch: Launch) -> Launch:
        operation.register_kernel("cuda")(launch)
        if interpreting():
            operation.register_kernel("cpu")(launch)
        return launch

    return register

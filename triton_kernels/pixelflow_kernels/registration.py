"""On which devices an operation's kernels run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from torch._library.custom_ops import CustomOpDef

Launch = TypeVar("Launch", bound=Callable[..., Any])


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``), which it decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched_by(operation: CustomOpDef) -> Callable[[Launch], Launch]:
    """Decorator: the function launches this operation's kernels, on CUDA and, where Triton interprets, on a CPU.

    Without the interpreter a CPU runs the operation's plain implementation.
    """

    def register(launch: Launch) -> Launch:
        operation.register_kernel("cuda")(launch)
        if interpreting():
            operation.register_kernel("cpu")(launch)
        return launch

    return register

"""CPU tensors treated as a GPU's: operations launch their kernels, which are compiled for it and emulated."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch._library.custom_ops import OPDEFS, CustomOpDef

from pixelflow_kernels import aot

from .ptx import EmulatedGPU, emulated

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

thorough = pytest.mark.skipif(os.environ.get("PIXELFLOW_EMULATE") != "all", reason="minutes of compiling: make emulate")
"""For emulated tests that a normal run leaves out."""

with_products = pytest.mark.parametrize("arch", [90, pytest.param(80, marks=thorough)])
by_arch = pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=thorough) for arch in (80, 100))])
"""Architectures for which kernels are emulated; those with products of matrices not for sm_100."""


@contextmanager
def compiled_for(arch: int) -> Iterator[EmulatedGPU]:
    """Inside, the project's operations do with CPU tensors what they do with those of a GPU of this architecture.

    They launch their kernels, with the configurations for ``sm_<arch>``, as Triton compiles them for it
    (:mod:`support.ptx`). Plain implementations run as ever (:func:`support.kernels.plain`).
    """
    with pytest.MonkeyPatch.context() as patch, emulated(arch) as gpu:
        for operation in operations():
            patch.setitem(operation._backend_fns, "cpu", operation._backend_fns["cuda"])
        for name, module in list(sys.modules.items()):
            if name.startswith("pixelflow_") and hasattr(module, "arch_of"):
                patch.setattr(module, "arch_of", lambda device: arch)
            if name.startswith("pixelflow_") and hasattr(module, "interpreting"):
                patch.setattr(module, "interpreting", lambda: True)
        yield gpu


def operations() -> list[CustomOpDef]:
    """The project's operations that launch kernels."""
    for op in aot.operations():
        for module in ("op", "kernels", "forward", "backward"):
            if importlib.util.find_spec(f"pixelflow_kernels.{op}.{module}"):
                importlib.import_module(f"pixelflow_kernels.{op}.{module}")
    return [operation for operation in list(OPDEFS.values()) if "cuda" in operation._backend_fns]

"""The simulated device as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import trace_rules
from torch._subclasses import fake_tensor
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes

from pixelflow_kernels import configs
from support.compiled import operations
from support.ptx import EmulatedGPU, emulated
from support.ptx import driver as emulator

from .placement import HOST_POINTER, Placement
from .runtime import Runtime


class SimulatedDevice:
    """The one CUDA device that this process seems to have inside of :meth:`active`.

    Args:
        arch: compute capability as one number, such as 90.
        emulated: whether operations of the project launch their kernels, which are then emulated; otherwise they are
            computed in plain PyTorch, which takes far less time.
    """

    def __init__(self, arch: int, emulated: bool = True) -> None:
        self.runtime = Runtime(arch)
        self.placement = Placement(self.runtime, operations(), emulated)

    @contextmanager
    def active(self) -> Iterator[EmulatedGPU]:
        """Simulate it; what lies on it remains there until the next time."""
        trace_rules.get_torch_obj_rule_map()  # a table of torch's functions, made once: not of the doubles
        configs._capability.cache_clear()
        run_backward = torch.autograd.graph._engine_run_backward

        def backward(roots: Any, *arguments: Any, **options: Any) -> Any:
            with self.placement.differentiating(any(x in self.runtime.device for x in roots)):
                return run_backward(roots, *arguments, **options)

        self.runtime.reset()
        with pytest.MonkeyPatch.context() as patch, emulated(self.runtime.arch) as gpu:
            self.runtime.install(patch)
            patch.setattr(emulator, "emulate", self._launch(emulator.emulate))
            for module in (torch.autograd, torch.autograd.graph):
                patch.setattr(module, "_engine_run_backward", backward)
            # Which refuses modes of others: what would be compiled runs as it is.
            patch.setattr(torch, "compile", lambda function=None, **_: function or (lambda given: given))
            # Fakes would compute with constants on a device that is there, and begin with a tensor on it.
            patch.setattr(fake_tensor.FakeTensorMode, "avoid_device_init", True)
            patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
            # Asked where a tensor is from within autograd, which has left the modes.
            patch.setitem(checkpoint._allowed_determinism_checks_to_fns, "default", lambda x: (x.shape, x.dtype))
            try:
                with self.placement.active():
                    yield gpu
            finally:
                configs._capability.cache_clear()

    def _launch(self, emulate: Any) -> Any:
        def launch(path: str, arguments: list[tuple[str, Any]], grid: tuple[int, int, int], shared: int) -> None:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                for _, value in arguments:
                    if isinstance(value, Tensor) and value not in self.runtime.device:
                        raise ValueError(HOST_POINTER)
                emulate(path, arguments, grid, shared)

        return launch

"""Where each tensor is: calls that name the device, and operations on its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from support.recording import RefusedError
from support.waits import INDEXING, name_of, waits

from .missing import MISSING
from .residents import Storages
from .runtime import Runtime, SimulatedGenerator

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
NAMED = re.compile(r"cpu|cuda(:\d+)?")

COPIES = {"copy_", "_foreach_copy_"}
MIXED = COPIES | INDEXING | {"_to_copy", "set_"}
"""Operations on tensors of two devices."""
UNPINNED = "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned."
HOST_POINTER = "Pointer argument cannot be accessed from Triton (cpu tensor?)"
GETTERS = {
    Tensor.device.__get__: lambda on_device: CUDA if on_device else CPU,
    Tensor.is_cuda.__get__: bool,
    Tensor.is_cpu.__get__: lambda on_device: not on_device,
    Tensor.get_device: lambda on_device: 0 if on_device else -1,
}
MADE_OF_PYTHONS_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
OF_THE_HOST = {Tensor.numpy, Tensor.__array__}
READ_UNSEEN = {Tensor.tolist, Tensor.__repr__}
"""Functions that read values, but not by an operation that a mode is shown."""
WHERE = {torch.where, Tensor.where}


class Placement:
    """The two modes that place tensors, and what they know.

    Attributes:
        emulated: whether the project's operations launch their kernels, or are what they mean in plain PyTorch.
        device: storages on the device.
        pinned: page-locked storages of the host.
        unasked: whether tensors that no call asks for are on the device: autograd's zeros for missing gradients.
    """

    def __init__(self, runtime: Runtime, operations: list[CustomOpDef], emulated: bool) -> None:
        self.runtime, self.emulated = runtime, emulated
        self.device, self.pinned = runtime.device, Storages()
        self.operations = {operation._qualname: operation for operation in operations}
        self.calls, self.tracked = _Calls(self), _Operations(self)
        self.unasked = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Both modes: around a test, and again where torch has left them to call Python."""
        with self.calls, self.tracked:
            yield

    @contextmanager
    def differentiating(self, on_device: bool) -> Iterator[None]:
        """While autograd runs, which calls derivatives in Python."""
        with self.calls, self.making(on_device):  # operations are tracked there anyway
            yield

    @contextmanager
    def making(self, on_device: bool) -> Iterator[None]:
        """Set ``unasked`` for a while."""
        before, self.unasked = self.unasked, on_device
        try:
            yield
        finally:
            self.unasked = before

    def copy(self, non_blocking: bool, host: Iterable[Tensor] = ()) -> None:
        """Between the devices: what the host does not wait for has to stay in place, if a graph is to repeat it.

        Args:
            host: tensors of the host that are read or written; what is made for the copy is page-locked.
        """
        if not non_blocking:
            self.runtime.wait("a copy between devices")
        if self.runtime.capturing and not all(x in self.pinned for x in host):
            raise RefusedError(UNPINNED)

    def place(self, out: Any, on_device: bool, inputs: list[Tensor]) -> Any:
        """Return results where they belong; one that is an input of the other device is copied first."""
        given = {x.untyped_storage()._cdata for x in inputs}

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor) or (x in self.device) == on_device:
                return x
            if x.untyped_storage()._cdata in given:
                x = x.clone()
            if on_device:
                self.runtime.allocate(x)
            else:
                self.device.discard(x)
            return x

        return tree_map(placed, out)


def faking() -> bool:
    """Whether tensors are fakes, which know their device."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class _Calls(TorchFunctionMode):
    """Calls of torch's functions: those that ask where a tensor is, and those that name a device."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, here = dict(kwargs or {}), self.placement
        if isinstance(func, torch._ops.OpOverload) or faking():  # by another mode, or by an operation of the project
            return func(*args, **kwargs)
        if (getter := GETTERS.get(func)) is not None:
            return getter(args[0] in here.device)
        if func is Tensor.is_pinned:
            return args[0] in here.pinned
        if func is Tensor.pin_memory:
            return self._pinned(args[0].clone())
        if func is Tensor.record_stream:
            return None
        if func in OF_THE_HOST and args[0] in here.device:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in READ_UNSEEN and args[0] in here.device:
            here.runtime.wait(func.__name__)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        pinned, wanted = kwargs.pop("pin_memory", False), self._wanted(func, args, kwargs)
        self._check_generator(wanted, tensors, kwargs)
        if func in WHERE and len({x in here.device for x in tensors}) > 1:
            here.runtime.wait("where with a tensor of the host")  # a number of Python's fills one of the device
        if wanted is None:
            with here.making(on_device=False):
                out = func(*args, **kwargs)
        else:
            if self._copies(func, wanted, tensors):
                non_blocking = kwargs.get("non_blocking", False)
                here.copy(non_blocking, tensors[:1] if wanted.type == "cuda" else ())
                pinned |= non_blocking and wanted.type == "cpu"
            if func is Tensor.cuda:
                func, args = Tensor.to, (args[0], CPU)
            args, kwargs = tree_map(_on_cpu, (args, kwargs))
            with here.making(on_device=False):
                out = func(*args, **kwargs)
            out = here.place(out, wanted.type == "cuda", tensors)
        return self._pinned(out) if pinned else out

    def _copies(self, func: Any, wanted: torch.device, tensors: list[Tensor]) -> bool:
        """Whether the call copies between devices."""
        if func in MADE_OF_PYTHONS_DATA and not (tensors and tensors[-1] in self.placement.device):
            return wanted.type == "cuda"
        moves = func in (Tensor.to, Tensor.cpu, Tensor.cuda) or func in MADE_OF_PYTHONS_DATA
        return moves and (tensors[0] in self.placement.device) != (wanted.type == "cuda")

    def _pinned(self, x: Tensor) -> Tensor:
        self.placement.pinned.add(x)
        return x

    def _wanted(self, func: Any, args: Any, kwargs: Any) -> torch.device | None:
        """The device that a call names."""
        if func is Tensor.cpu:
            return CPU
        if func is Tensor.cuda:
            return CUDA
        if kwargs.get("device") is not None:
            return torch.device(kwargs["device"])
        if func is Tensor.to and len(args) > 1:
            if isinstance(args[1], Tensor):
                return CUDA if args[1] in self.placement.device else CPU
            if isinstance(args[1], torch.device) or (isinstance(args[1], str) and NAMED.fullmatch(args[1])):
                return torch.device(args[1])
        return None

    def _check_generator(self, wanted: torch.device | None, tensors: list[Tensor], kwargs: Any) -> None:
        generator = kwargs.get("generator")
        if generator is None:
            return
        if wanted is None:
            wanted = CUDA if any(x in self.placement.device for x in tensors) else CPU
        of = "cuda" if isinstance(generator, SimulatedGenerator) else "cpu"
        if of != wanted.type:
            raise RuntimeError(f"Expected a '{wanted.type}' device type for generator but found '{of}'")


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device) or (isinstance(x, str) and NAMED.fullmatch(x)):
        return CPU
    return x


class _Operations(TorchDispatchMode):
    """Operations of the device's tensors: on one device, and their results are there as well."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, here = kwargs or {}, self.placement
        if faking():
            return func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x in here.device for x in tensors]
        if not any(there):
            out = func(*args, **kwargs)
            return self._results(out, []) if here.unasked and not tensors else out
        name = name_of(func)
        if (operation := here.operations.get(func._schema.name)) is not None:
            # Where they are launched, all that kernels are given is checked; a table's addresses stay on the host.
            values = [on_device for x, on_device in zip(tensors, there, strict=True) if x.is_floating_point()]
            if not here.emulated and not all(values):
                raise ValueError(HOST_POINTER)
            return self._results(self._run(operation, func, args, kwargs), tensors)
        others = [x for x, on_device in zip(tensors, there, strict=True) if not on_device]
        if any(x.dim() > 0 for x in others) and name not in MIXED:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({func})"
            )
        if (what := waits(func, args, kwargs, here.device.__contains__)) is not None:
            here.runtime.wait(what)
        if others and name in COPIES:
            here.copy(kwargs.get("non_blocking", args[2] if len(args) > 2 else False), others)
        with torch._C.DisableTorchFunction():
            out = MISSING.get(func._schema.name, func)(*args, **kwargs)
        return self._results(out, tensors)

    def _run(self, operation: CustomOpDef, func: Any, args: Any, kwargs: Any) -> Any:
        if self.placement.emulated:
            with self.placement.active():
                return operation._backend_fns["cuda"](*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def _results(self, out: Any, tensors: list[Tensor]) -> Any:
        given = {x.untyped_storage()._cdata for x in tensors}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self.placement.runtime.allocate(x)
        return out

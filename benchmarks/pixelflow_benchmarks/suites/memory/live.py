"""Bytes that live at once, by two accounts: what operations give back, and what the CPU's allocator was asked for.

The first sees tensors, also fake ones, so it needs neither a device nor memory. What a kernel takes and releases inside
one operation is hidden from it. The second sees every request to PyTorch's allocator for CPUs, that one included, but
not what a library takes from the system itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pixelflow_benchmarks.harness.profiling import cpu_profile


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the tensors that operations make, until nobody holds them any more.

    What was there before, like weights, is not counted, nor are views of it.

    Args:
        device: only tensors of this kind of device count: ``cpu``, ``cuda``.
        weights: tensors whose casts live to the end, as those that autocast makes of them do.

    Attributes:
        now: bytes that live.
        peak: the most that lived at once.
    """

    def __init__(self, device: str, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._device = device
        self._weights = {id(weight) for weight in weights}
        self._casts: list[Any] = []
        self._known: set[int] = set()
        self._finalizers: list[weakref.finalize[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        kwargs = kwargs or {}
        for tensor in self._tensors((args, kwargs)):
            self._note(tensor, 0)  # unseen so far: it was there before
        out = func(*args, **kwargs)
        if func._schema.name == "aten::_to_copy" and id(args[0]) in self._weights:
            self._casts.append(out)
        for tensor in self._tensors(out):
            self._note(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def __exit__(self, *raised: Any) -> None:
        """Stop counting; what is released later changes nothing."""
        for finalizer in self._finalizers:
            finalizer.detach()
        self._finalizers.clear()
        self._casts.clear()
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _tensors(self, tree: Any) -> Iterator[Tensor]:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                yield leaf

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        # A storage's Python object lives as long as the storage does, whoever holds it.
        self._finalizers.append(weakref.finalize(storage, self._release, key, size))

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def allocator_peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator for CPUs had given out at once during a run, beside those before it."""
    with cpu_profile(memory=True) as found:
        kept = run()
    del kept  # until now, so that what is returned counts to the end
    results: Any = found.profiler.kineto_results if found.profiler is not None else None
    if results is None:
        return 0
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):  # those of one moment stay in their order
        now += change
        peak = max(peak, now)
    return peak

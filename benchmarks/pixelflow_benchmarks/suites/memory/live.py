"""Bytes alive at the same time, counted in two ways: from the results of operations, and from the CPU's allocator.

The first way (:class:`LiveBytes`) sees tensors, also fake ones, so that it needs neither a device nor memory. It does
not see what a kernel allocates and releases within one operation. The second way (:func:`allocator_peak`) sees every
request to PyTorch's CPU allocator, those within an operation included, but not what a library takes from the system.
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
    """Dispatch mode that counts the bytes of the storages that operations create, until their last reference is gone.

    Tensors that existed before, such as weights, are not counted, nor are views of them.

    Args:
        device: type of the devices whose tensors count: ``cpu`` or ``cuda``.
        weights: tensors whose casts are kept alive to the end, as autocast keeps its casts of weights.

    Attributes:
        now: bytes alive now.
        peak: the most bytes alive at the same time so far.
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
        """Run the operation and count the storages that it creates."""
        kwargs = kwargs or {}
        for tensor in self._tensors((args, kwargs)):
            self._note(tensor, 0)  # not seen before as a result: it existed before counting began
        out = func(*args, **kwargs)
        if func._schema.name == "aten::_to_copy" and id(args[0]) in self._weights:
            self._casts.append(out)
        for tensor in self._tensors(out):
            self._note(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def __exit__(self, *raised: Any) -> None:
        """Stop counting; later releases change nothing."""
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
        # A storage's Python object lives as long as the storage itself, whatever refers to it.
        self._finalizers.append(weakref.finalize(storage, self._release, key, size))

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def allocator_peak(run: Callable[[], object]) -> int:
    """Return the peak of the bytes handed out by PyTorch's CPU allocator during a run, beyond those before it."""
    with cpu_profile(memory=True) as found:
        kept = run()
    del kept  # only now, so that what the run returns counts to the end
    results: Any = found.profiler.kineto_results if found.profiler is not None else None
    if results is None:
        return 0
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda one: one[0]):  # stable: changes at the same time stay in order
        now += change
        peak = max(peak, now)
    return peak

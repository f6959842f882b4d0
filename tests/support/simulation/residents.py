"""Which memory is the simulated device's, and which is page-locked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

SOME = 4096  # references to look through at once for those whose storage is gone


class Storages:
    """A set of storages that holds none of them alive."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self._look = SOME

    def __contains__(self, x: Tensor) -> bool:
        # A storage's address is not used again while there is a weak reference to it.
        reference = self._known.get(x.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def add(self, x: Tensor) -> None:
        """Add a tensor's storage, and with it all of its views."""
        storage = x.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage)
        if len(self._known) >= self._look:
            self._forget()
            self._look = len(self._known) + SOME

    def discard(self, x: Tensor) -> None:
        """Remove a tensor's storage."""
        self._known.pop(x.untyped_storage()._cdata, None)

    def bytes(self) -> int:
        """Size of all storages that still exist."""
        self._forget()
        total = 0
        for reference in self._known.values():
            total += torch.UntypedStorage._new_with_weak_ptr(reference.cdata).nbytes()
        return total

    def _forget(self) -> None:
        self._known = {key: reference for key, reference in self._known.items() if not reference.expired()}

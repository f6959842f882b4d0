"""Global memory as the tensors of this process, with every access checked; and shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import EmulationError

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Array = NDArray[np.generic]


@dataclass(frozen=True)
class _Access:
    """One instruction's accesses to one allocation: offsets in bytes, and who made them between which barriers.

    ``before`` has what a store overwrote, an element at a time; it is empty for a load.
    """

    span: int
    width: int
    offsets: Array
    threads: Array
    epochs: Array
    before: tuple[Array, ...] = ()


class GlobalMemory:
    """The memory of the given tensors, all of their storages; anything else is out of bounds.

    Args:
        tensors: CPU tensors; storages that several of them share count once.
        threads: threads per program, by which a thread's number gives its program.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], threads: int) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if x.numel()}
        self.bases = np.array(sorted(storages), dtype=np.uint64)
        self.sizes = np.array([storages[int(base)].nbytes() for base in self.bases], dtype=np.uint64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * int(size)).from_address(int(base)))
            for base, size in zip(self.bases, self.sizes, strict=True)
        ]
        self.threads = threads
        self.accesses: list[_Access] = []

    def load(self, addresses: Array, width: int, count: int, threads: Array, epochs: Array) -> list[Array]:
        """Read ``count`` neighbouring elements of ``width`` bytes per thread."""
        found = [np.empty(len(addresses), UNSIGNED[width]) for _ in range(count)]
        for span, which, offsets in self._locate(addresses, width * count):
            self.accesses.append(_Access(span, width * count, offsets, threads[which], epochs[which]))
            values = self._elements(span, width)
            for i, part in enumerate(found):
                part[which] = values[offsets // width + i]
        return found

    def store(self, addresses: Array, width: int, values: list[Array], threads: Array, epochs: Array) -> None:
        """Write neighbouring elements of ``width`` bytes per thread."""
        for span, which, offsets in self._locate(addresses, width * len(values)):
            elements, places = self._elements(span, width), offsets // width
            before = tuple(elements[places + i] for i in range(len(values)))
            who = (threads[which], epochs[which])
            self.accesses.append(_Access(span, width * len(values), offsets, *who, before))
            for i, part in enumerate(values):
                elements[places + i] = part[which]

    def _elements(self, span: int, width: int) -> Array:
        data = self.bytes[span]
        return data[: len(data) // width * width].view(UNSIGNED[width])

    def _locate(self, addresses: Array, width: int) -> Iterable[tuple[int, Array | slice, Array]]:
        """Yield allocations, which of the addresses lie in each, and their offsets."""
        if not len(addresses):
            return
        if (addresses % np.uint64(width)).any():
            bad = addresses[(addresses % np.uint64(width)) != 0][0]
            raise EmulationError(f"address {int(bad):#x} of {width} bytes is not aligned to them")
        spans = np.searchsorted(self.bases, addresses, side="right").astype(np.int64) - 1
        offsets = (addresses - self.bases[spans]).astype(np.int64) if len(self.bases) else np.full(len(addresses), -1)
        inside = (
            (spans >= 0) & (offsets + width <= self.sizes[spans].astype(np.int64)) if len(self.bases) else offsets > 0
        )
        if not inside.all():
            outside = np.flatnonzero(~inside)
            address = int(addresses[outside[0]])
            raise EmulationError(
                f"{len(outside)} threads access memory of no tensor, e.g. {width} bytes at {address:#x}"
            )
        if spans[0] == spans[-1] and (spans == spans[0]).all():
            yield int(spans[0]), slice(None), offsets
            return
        for span in np.unique(spans):
            which = np.flatnonzero(spans == span)
            yield int(span), which, offsets[which]

    def written(self) -> list[Array]:
        """Return a copy of every allocation that was written to."""
        return [self.bytes[span].copy() for span in sorted({access.span for access in self.accesses if access.before})]

    def undo(self) -> None:
        """Restore what all stores overwrote, and forget all accesses."""
        for access in reversed(self.accesses):
            if access.before:
                width = access.width // len(access.before)
                elements = self._elements(access.span, width)
                for i, part in enumerate(access.before):
                    elements[access.offsets // width + i] = part
        self.accesses = []

    def conflict_of_programs(self) -> str | None:
        """Describe a place that one program writes and another one accesses."""
        return self._conflict(lambda places, threads, epochs: ((places,), threads // self.threads))

    def conflict_of_warps(self) -> str | None:
        """Describe a place that one warp writes and another one of the program accesses, without a barrier between."""
        return self._conflict(
            lambda places, threads, epochs: ((places, threads // self.threads, epochs), threads // 32)
        )

    def _conflict(self, divide: Callable[[Array, Array, Array], tuple[tuple[Array, ...], Array]]) -> str | None:
        for span in sorted({access.span for access in self.accesses if access.before}):
            accesses = [access for access in self.accesses if access.span == span]
            unit = min(access.width for access in accesses)
            places, threads, epochs, wrote = _expanded(accesses, unit)
            group, member = divide(places, threads, epochs)
            if (place := _shared(group, member, wrote)) is not None:
                return f"byte {place * unit} of {int(self.sizes[span])} at {int(self.bases[span]):#x}"
        return None


def _expanded(accesses: list[_Access], unit: int) -> tuple[Array, Array, Array, Array]:
    """Return place (in units), thread, epoch, and whether it was written, for every unit of every access."""
    columns: list[list[Array]] = [[], [], [], []]
    for access in accesses:
        times = access.width // unit
        places = access.offsets[:, None] // unit + np.arange(times)
        columns[0].append(places.ravel())
        columns[1].append(np.repeat(access.threads, times))
        columns[2].append(np.repeat(access.epochs, times))
        columns[3].append(np.full(places.size, bool(access.before)))
    return tuple(np.concatenate(column) for column in columns)  # type: ignore[return-value]


def _shared(group: tuple[Array, ...], member: Array, wrote: Array) -> int | None:
    """Return a place of a group that has several members and a write; None if there is none."""
    order = np.lexsort((member, *reversed(group)))
    keys = [key[order] for key in group]
    starts = np.ones(len(order), bool)
    starts[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    first = np.flatnonzero(starts)
    members = member[order]
    last = np.append(first[1:], len(order)) - 1
    written = np.logical_or.reduceat(wrote[order], first)
    bad = np.flatnonzero((members[first] != members[last]) & written)
    return int(keys[0][first[bad[0]]]) if len(bad) else None


class SharedMemory:
    """The shared memory of several programs, all bits set at first (NaN in every type).

    Addresses are those of the programs, from 0; ``programs`` says whose.
    """

    def __init__(self, programs: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 1024) * 1024
        self.bytes = np.full(max(programs * self.stride, 16), 0xFF, np.uint8)

    def indices(self, addresses: Array, programs: Array, width: int) -> Array:
        """Return indices into ``bytes`` for checked addresses."""
        addresses = addresses.astype(np.int64)
        if (addresses % width).any():
            raise EmulationError(f"an address in shared memory is not aligned to {width} bytes")
        if (addresses + width > self.size).any():
            raise EmulationError(f"{int(addresses.max())} + {width} bytes is beyond the {self.size} of shared memory")
        return addresses + programs * self.stride

    def elements(self, width: int) -> Array:
        """Return all memory as elements of ``width`` bytes."""
        return self.bytes.view(UNSIGNED[width])

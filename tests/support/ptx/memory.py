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
    """The memory of tensors, all of their storages; anything else is out of bounds.

    Args:
        tensors: CPU tensors; storages that several of them share count once.
        others: called for further tensors when an address lies in none of these.
        threads: threads per program, by which a thread's number gives its program.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor], others: Callable[[], Iterable[torch.Tensor]], threads: int
    ) -> None:
        self.threads = threads
        self.accesses: list[_Access] = []
        self.bytes: list[NDArray[np.uint8]] = []  # one for each storage
        self._spans: dict[int, int] = {}  # by its address, a storage's index in that list
        self._others: Callable[[], Iterable[torch.Tensor]] | None = others
        self._add(tensors)

    def _add(self, tensors: Iterable[torch.Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if size and address not in self._spans:
                self._spans[address] = len(self.bytes)
                self.bytes.append(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))
        self._bases = np.array(sorted(self._spans), np.uint64)
        self._order = np.array([self._spans[int(base)] for base in self._bases], np.int64)
        self._ends = np.array([self.bytes[i].size for i in self._order], np.uint64) + self._bases

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
        places = np.searchsorted(self._bases, addresses, side="right").astype(np.int64) - 1
        inside = places >= 0
        if len(self._bases):
            inside &= addresses + np.uint64(width) <= self._ends[places]
        if not inside.all():
            if self._others is not None:
                self._add(self._others())
                self._others = None
                yield from self._locate(addresses, width)
                return
            outside = addresses[~inside]
            raise EmulationError(
                f"{len(outside)} threads access memory of no tensor, e.g. {width} bytes at {int(outside[0]):#x}"
            )
        offsets = (addresses - self._bases[places]).astype(np.int64)
        if places[0] == places[-1] and (places == places[0]).all():
            yield int(self._order[places[0]]), slice(None), offsets
            return
        for place in np.unique(places):
            which = np.flatnonzero(places == place)
            yield int(self._order[place]), which, offsets[which]

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
                return f"byte {place * unit} of a storage of {self.bytes[span].size}"
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

"""A CPU stand-in for CUDA graphs that holds launches to the contract of real ones, and is stricter where it can be.

During capture every dispatched operation is recorded with its tensors; a replay runs exactly these operations again on
the same memory, and none of the launch's Python. What a real capture refuses is refused: values read on the host,
shapes that depend on values, tensors made from Python data, tensors that move to another device. What would break a
real graph silently is an error, or becomes visible:

- A graph does not own what it reads: memory that was freed or moved since is an error.
- What a launch allocates belongs to the pool and may be overwritten by any other graph: it is poisoned after capture
  and after every replay.
- A capture runs nothing, but its warm-up does: what a launch writes to is poisoned after capture.
- A closed graph cannot be replayed.

"Poison" is NaN, or a number far outside the usual range.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.graphs import Launch, reported
from pixelflow_engine.operations import PlainOperations
from pixelflow_engine.packed_stages import ProgramStore

from .engines import tiny_config, tiny_model, uncompiled
from .waits import name_of, waits

# Python functions that read or make values without a dispatched operation.
HOST_FUNCTIONS = {
    torch.tensor: "a tensor made of Python's data",
    torch.as_tensor: "a tensor made of Python's data",
    torch.asarray: "a tensor made of Python's data",
    torch.from_numpy: "a tensor made of Python's data",
    torch.frombuffer: "a tensor made of Python's data",
    Tensor.new_tensor: "a tensor made of Python's data",
    Tensor.tolist: "values read on the host",
    Tensor.numpy: "values read on the host",
    Tensor.__array__: "values read on the host",
    Tensor.cpu: "values read on the host",
    Tensor.cuda: "a copy to the device",
    Tensor.pin_memory: "memory of the host",
}


class RefusedError(RuntimeError):
    """An operation that is not permitted during capture; worded like the driver's errors."""


def poison(x: Tensor) -> None:
    """Overwrite the tensor's values with poison."""
    if x.is_floating_point():
        x.fill_(torch.nan)
    elif x.dtype != torch.bool:
        x.fill_(torch.iinfo(x.dtype).max // 2)


class _Outside:
    """A tensor that a graph reads or writes but does not own, with its memory at the time of capture."""

    def __init__(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.storage = StorageWeakRef(storage)
        self.address, self.bytes = storage.data_ptr(), storage.nbytes()
        self.dtype, self.place = x.dtype, (x.storage_offset(), tuple(x.shape), x.stride())

    def tensor(self) -> Tensor:
        """Return a tensor over the same memory, if it still exists."""
        storage = None if self.storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RefusedError(f"a graph reads memory that was given up: {self.dtype} {self.place[1]}")
        if (storage.data_ptr(), storage.nbytes()) != (self.address, self.bytes):
            raise RefusedError(f"a graph reads memory that has moved: {self.dtype} {self.place[1]}")
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, *self.place)


@dataclass
class _Node:
    """One operation: arguments, in which slots stand for tensors, and the slots of its results."""

    operation: Any
    arguments: list[Any]
    form: Any
    outputs: list[int | None]
    writes: list[int]


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor among an operation's arguments."""

    number: int


class _Record(TorchDispatchMode):
    """Runs operations and records them."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.slots: list[Tensor | _Outside] = []
        self.known: dict[int, int] = {}
        self.alive: list[Tensor] = []  # so that neither ids nor memory are reused while recording
        self.made: set[int] = set()
        self.outside = {0}
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":  # profiler ranges are on the host: a graph has none
            return func(*args, **kwargs)
        self.refuse(func, args, kwargs)
        flat, form = tree_flatten((args, kwargs))
        arguments = [_Slot(self._slot(x)) if isinstance(x, Tensor) else x for x in flat]
        writes = [s.number for s, x in zip(arguments, flat, strict=True) if isinstance(x, Tensor)]
        writes = [number for number in writes if number in self._written(func, args, kwargs)]
        self.inside = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = False
        inputs = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, Tensor) and x.numel() > 0}
        outputs = [self._output(x, inputs) if isinstance(x, Tensor) else None for x in tree_flatten(out)[0]]
        self.nodes.append(_Node(func, arguments, form, outputs, writes))
        return out

    def refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        """Raise an error for what cannot be captured; a number may be of the host."""
        what, device = waits(func, args, kwargs, lambda x: x.dim() > 0), kwargs.get("device")
        if what is None and device is not None and torch.device(device).type != "cpu":
            what = f"{name_of(func)} to {device}"
        if what is not None:
            raise RefusedError(f"operation not permitted when stream is capturing: {what}")

    def _slot(self, x: Tensor) -> int:
        if id(x) not in self.known:
            # Autograd returns saved tensors as new objects over the same memory.
            self._know(x, x if x.untyped_storage().data_ptr() in self.made else _Outside(x))
        return self.known[id(x)]

    def _know(self, x: Tensor, slot: Tensor | _Outside) -> None:
        self.known[id(x)] = len(self.slots)
        self.slots.append(slot)
        if isinstance(slot, _Outside):
            self.outside.add(slot.address)
        self.alive.append(x)

    def _output(self, x: Tensor, inputs: set[int]) -> int:
        """Return a result's slot: a new one, unless the tensor is known already, as after an in-place operation."""
        if id(x) not in self.known:
            self._know(x, x)
            address = x.untyped_storage().data_ptr()
            if address not in inputs and address not in self.outside:
                self.made.add(address)
        return self.known[id(x)]

    def _written(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
        found = set()
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                found |= {self._slot(x) for x in tree_flatten(value)[0] if isinstance(x, Tensor)}
        return found


class _Host(TorchFunctionMode):
    """Refuses functions that access the host without a dispatched operation."""

    def __init__(self, record: _Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_FUNCTIONS and not self.record.inside:  # inside an operation, its implementation may do so
            raise RefusedError(f"operation not permitted when stream is capturing: {HOST_FUNCTIONS[func]}")
        return func(*args, **(kwargs or {}))


class _Graph:
    """A recorded graph, which owns only what the launch itself allocated."""

    def __init__(self, record: _Record, kept: Sequence[Tensor] = ()) -> None:
        self.nodes = record.nodes
        # Autograd's bookkeeping, such as which views may not be written to, no longer matters: detach the tensors.
        self.slots = [slot if isinstance(slot, _Outside) else slot.data for slot in record.slots]
        self.closed = False
        # A view of outside memory is outside, too: only new allocations are the graph's.
        outside = record.outside - {0}
        for i, x in enumerate(self.slots):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in outside:
                self.slots[i] = _Outside(x)
        written = {number for node in self.nodes for number in node.writes}
        spared = {x.untyped_storage().data_ptr() for x in kept}
        for number in written:
            slot = self.slots[number]
            if isinstance(slot, _Outside) and slot.address not in spared:
                poison(slot.tensor())
        self._poison()

    def _poison(self) -> None:
        for slot in self.slots:
            if isinstance(slot, Tensor):
                poison(slot)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again."""
        if self.closed:
            raise RefusedError("a closed graph was replayed")
        tensors = [slot.tensor() if isinstance(slot, _Outside) else slot for slot in self.slots]
        for node in self.nodes:
            flat = [tensors[x.number] if isinstance(x, _Slot) else x for x in node.arguments]
            args, kwargs = tree_unflatten(flat, node.form)
            out = tree_flatten(node.operation(*args, **kwargs))[0]
            for number, value in zip(node.outputs, out, strict=True):
                if number is not None and value.numel() > 0 and value.data_ptr() != tensors[number].data_ptr():
                    tensors[number].copy_(value)
        self._poison()


class RecordingCapture:
    """Implements :class:`pixelflow_engine.graphs.Capture`; the capture with number ``fail_at`` (from 0) fails.

    Attributes:
        captured: number of captures requested so far.
        replayed: number of replays.
        turns: calls of ``leave`` and ``follow``, with the thread and the number of the turn that was left.
        kept: tensors that launches write to but have to leave unchanged while being captured, which is checked.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.graphs: list[_Graph] = []
        self.fail_at = fail_at
        self.captured = self.replayed = 0
        self.turns: list[tuple[str, int, int]] = []
        self.kept: Sequence[Tensor] = ()

    def capture(self, launch: Launch) -> Launch:
        """See :class:`Capture`."""
        number, self.captured = self.captured, self.captured + 1
        record, before = _Record(), [x.clone() for x in self.kept]
        with reported():
            for _ in range(2):
                launch()
            with record, _Host(record):
                launch()
            for x, value in zip(self.kept, before, strict=True):
                assert torch.equal(x, value), "a capture has changed what it must keep"
            if number == self.fail_at:
                raise RefusedError("failed on purpose\nand a second line")
        graph = _Graph(record, self.kept)
        self.graphs.append(graph)

        def replay() -> None:
            self.replayed += 1
            graph.replay()

        return replay

    def leave(self) -> int:
        """See :class:`Capture`; returns the number of the turn."""
        self.turns.append(("left", threading.get_ident(), len(self.turns)))
        return len(self.turns) - 1

    def follow(self, left: object) -> None:
        """See :class:`Capture`."""
        assert isinstance(left, int)
        self.turns.append(("followed", threading.get_ident(), left))

    def close(self) -> None:
        """See :class:`Capture`."""
        for graph in self.graphs:
            graph.closed = True
            graph.nodes, graph.slots = [], []
        self.graphs.clear()


def packed_engine(capture: RecordingCapture | None = None, seed: int = 1, **options: Any) -> PixelFlowEngine:
    """Return a small engine that runs packed stages uncompiled on a CPU, and replays steps from recordings.

    Args:
        capture: makes the recordings; None if steps are not to be replayed.
        seed: seed of the weights.
        options: ``plain=True`` for operations that read a prompt's mask; ``batch_sizes``; fields of the model's and
            the cascade's configuration.
    """
    batch_sizes, plain = options.pop("batch_sizes", None), options.pop("plain", False)
    config = tiny_config(**options)
    with uncompiled():
        engine = PixelFlowEngine(config, tiny_model(config, seed), "torch", compile=True, batch_sizes=batch_sizes)
    if plain:
        engine.model.operations = PlainOperations()
    engine._programs = ProgramStore(capture)
    return engine


def statics(store: ProgramStore) -> Iterator[Tensor]:
    """Yield every tensor into which a call loads values."""
    for program in store.programs.values():
        for value in vars(program).values():
            if isinstance(value, Tensor):
                yield value
        if hasattr(program, "state"):
            yield from program.state.tensors()
    for static in store.prompts.values():
        yield from static.tensors()

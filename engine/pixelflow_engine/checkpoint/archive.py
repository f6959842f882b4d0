"""Validation of a ``.pt`` file without unpickling it.

``torch.load(weights_only=True)`` runs no code, but that is not enough for untrusted files. They can make it crash the
process: it hashes whatever a pickle uses as a key, and a tuple nested a million deep overflows the C stack. It
allocates whatever the file asks for, for example ``bytearray(10**11)``. With memory mapping, it reads past the end of a
tensor's record. So the archive is first checked against a much smaller language, that of a state dict.
"""

from __future__ import annotations

import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixelflow_engine.errors import CheckpointError

from .directory import check_directory
from .problems import about, listed
from .text import check_is_file

ZIP_MAGIC = b"PK\x03\x04"
LARGEST_PICKLE = 4 * 1024 * 1024
MOST_OPCODES = 250_000  # three times as many as a training checkpoint of the published model
STORAGE_ITEM_BYTES = {
    "torch DoubleStorage": 8,
    "torch FloatStorage": 4,
    "torch HalfStorage": 2,
    "torch BFloat16Storage": 2,
    "torch LongStorage": 8,
    "torch IntStorage": 4,
    "torch ShortStorage": 2,
    "torch CharStorage": 1,
    "torch ByteStorage": 1,
    "torch BoolStorage": 1,
}


class _Known:
    """The functions and classes that a state dict refers to, as spelled in a pickle."""

    ORDERED_DICT = "collections OrderedDict"
    NAMESPACE = "argparse Namespace"
    TENSOR = "torch._utils _rebuild_tensor_v2"
    PARAMETER = "torch._utils _rebuild_parameter"


KNOWN_GLOBALS = {_Known.ORDERED_DICT, _Known.NAMESPACE, _Known.TENSOR, _Known.PARAMETER, *STORAGE_ITEM_BYTES}


def check_archive(path: Path) -> None:
    """Refuse a file that is not what ``torch.save`` writes for state dicts and plain data.

    Args:
        path: the ``.pt`` file. All of it is read, for the checksums.

    Raises:
        CheckpointError: it is not a complete archive, a record is damaged, or its pickle asks for anything but dicts,
            lists, tuples, strings, numbers, booleans, None, tensors and an ``argparse.Namespace``.
    """
    with about(path, OSError):
        check_is_file(path)
        with path.open("rb") as file:
            if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                raise CheckpointError(f"{path}: not a file that torch.save wrote (since torch 1.6)")
    # Exception: zipfile raises RuntimeError for encrypted entries, NotImplementedError for unknown compression methods,
    # and errors of struct and codecs for broken directories; a broken pickle can raise as many kinds.
    with about(path, Exception), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        check_directory(file, len(archive.infolist()), path)
        records = _check_records(archive, path)
        name = _pickle_name(archive, records, path)
        storages = _StateDictPickle(path).run(archive.read(name))
        _check_storages(storages, records, name.removesuffix("data.pkl"), path)
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path}: the record {listed([damaged])} is damaged: its checksum does not match")


def _check_records(archive: zipfile.ZipFile, path: Path) -> dict[str, int]:
    """Sizes of the records by name, after checking that each has the same size on disk as in memory."""
    entries = archive.infolist()
    records = {entry.filename: entry.file_size for entry in entries}
    if len({name.lower() for name in records}) < len(entries):  # torch's reader ignores case
        raise CheckpointError(f"{path}: a record occurs twice")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise CheckpointError(f"{path}: holds compressed records, which torch.save does not write")
    if sum(records.values()) > path.stat().st_size:
        raise CheckpointError(f"{path}: its records claim {sum(records.values())} bytes, more than the file has")
    return records


def _pickle_name(archive: zipfile.ZipFile, records: dict[str, int], path: Path) -> str:
    folder = archive.infolist()[0].filename.partition("/")[0] if records else ""
    name = f"{folder}/data.pkl"
    if name not in records or f"{folder}/constants.pkl" in records:
        raise CheckpointError(f"{path}: not a file of torch.save: no data.pkl, or a TorchScript program")
    if records[name] > LARGEST_PICKLE:
        raise CheckpointError(f"{path}: {name} has {records[name]} bytes, expected at most {LARGEST_PICKLE}")
    return name


def _check_storages(storages: dict[str, int], records: dict[str, int], prefix: str, path: Path) -> None:
    for key, size in storages.items():
        record = records.get(f"{prefix}data/{key}")
        if record != size:
            raise CheckpointError(f"{path}: storage {listed([key])} has {record} bytes in the file, expected {size}")


@dataclass(frozen=True)
class _Global:
    """A class or function that the pickle refers to. It stays a name and is never imported."""

    name: str


@dataclass(frozen=True)
class _Object:
    """Stand-in for the result of calling a known name."""

    kind: str


@dataclass
class _StateDictPickle:
    """Interprets a pickle's opcodes over inert stand-ins, and refuses what a state dict does not need.

    Attributes:
        path: the file, for messages.
        storages: sizes in bytes of the storages that tensors refer to, by key; this is the result.
        stack, marks, memo: the working state of the pickle's machine.
    """

    path: Path
    storages: dict[str, int] = field(default_factory=dict)
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, pickle: bytes) -> dict[str, int]:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count == MOST_OPCODES:
                raise CheckpointError(f"{self.path}: is a pickle of more than {MOST_OPCODES} steps")
            self.step(opcode.name, argument)
        return self.storages

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                self.stack = self.marks.pop()
                self.stack.append(tuple(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.pop(int(opcode[-1]))))
            case "SETITEM":
                self.check_items(self.pop(2))
            case "SETITEMS":
                self.stack = self.marks.pop()
                self.check_items(stack)
            case "APPEND":
                self.check_elements(self.pop(1))
            case "APPENDS":
                self.stack = self.marks.pop()
                self.check_elements(stack)
            case "GLOBAL":
                stack.append(self.checked_global(argument))
            case "REDUCE" | "NEWOBJ":
                stack.append(self.checked_call(*self.pop(2)))
            case "BUILD":
                self.check_state(*self.pop(1))
            case "BINPERSID":
                stack.append(self.checked_storage(*self.pop(1)))
            case "PROTO":
                self.require(argument == 2, f"is a pickle of protocol {argument}, expected 2")
            case "STOP":
                self.require(len(stack) == 1 and not self.marks, "is a pickle that ends in the middle")
            case _:
                raise CheckpointError(f"{self.path}: is a pickle with {opcode}, which a state dict does not need")

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise CheckpointError(f"{self.path}: {problem}")

    def pop(self, count: int) -> list[Any]:
        taken = self.stack[-count:]
        if len(taken) < count:
            raise CheckpointError(f"{self.path}: is a pickle that takes from an empty stack")
        del self.stack[-count:]
        return taken

    def check_items(self, flat: list[Any]) -> None:
        """Check that keys are hashable without recursion; the items themselves are not needed."""
        target = self.stack[-1]
        self.require(
            type(target) is dict or target == _Object(_Known.ORDERED_DICT),
            "sets an item of what is not a dict",
        )
        self.require(len(flat) % 2 == 0, "is a pickle with a key without a value")
        self.require(all(type(key) in (str, int) for key in flat[::2]), "has a dict key that is no string or integer")

    def check_elements(self, elements: list[Any]) -> None:
        self.require(type(self.stack[-1]) is list, f"appends {len(elements)} elements to what is not a list")

    def checked_global(self, name: str) -> _Global:
        self.require(
            name in KNOWN_GLOBALS,
            f"names {listed([name.replace(' ', '.')])}, which is neither run nor imported: weights and plain data only",
        )
        return _Global(name)

    def checked_call(self, function: Any, arguments: Any) -> _Object:
        """The result of a call; unknown functions are refused, and so are arguments that torch.save never passes."""
        name = function.name if type(function) is _Global else ""
        match name, arguments:
            case _Known.ORDERED_DICT | _Known.NAMESPACE, ():
                return _Object(name)
            case _Known.TENSOR, (
                _Object("storage"),
                int(),
                tuple(shape),
                tuple(strides),
                bool(),
                _Object(hooks),
            ):
                integers = all(type(number) is int and number >= 0 for number in shape + strides)
                self.require(integers and hooks == _Known.ORDERED_DICT, "has a tensor without a proper shape")
                return _Object("tensor")
            case _Known.PARAMETER, (_Object("tensor"), bool(), _Object(_Known.ORDERED_DICT)):
                return _Object("tensor")
        called = name.replace(" ", ".") or "what is no function"
        raise CheckpointError(f"{self.path}: calls {called} in a way that torch.save does not")

    def check_state(self, state: Any) -> None:
        known = self.stack[-1] in (_Object(_Known.ORDERED_DICT), _Object(_Known.NAMESPACE))
        self.require(known and type(state) is dict, "sets the attributes of what has none")

    def checked_storage(self, identity: Any) -> _Object:
        match identity:
            case ("storage", _Global(name), str() as key, str(), int() as count) if name in STORAGE_ITEM_BYTES:
                size = count * STORAGE_ITEM_BYTES[name]
                self.require(self.storages.setdefault(key, size) == size, "has a storage of two sizes")
                return _Object("storage")
        raise CheckpointError(f"{self.path}: refers to data in a way that torch.save does not")

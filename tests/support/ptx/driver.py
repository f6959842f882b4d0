"""A Triton driver whose device is the emulator: launches take Triton's own path up to the driver."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from .control import Block, prepare
from .errors import EmulationError
from .machine import Machine, run
from .memory import GlobalMemory
from .text import Program, float_bits, parse

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have
AT_ONCE = 4096  # threads that are emulated together


class EmulatedGPU(DriverBase):
    """Compiles for an architecture, and emulates.

    Attributes:
        launched: number of launches by the kernel's name.
    """

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.launched: Counter[str] = Counter()
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        """Never chosen unless it is asked for."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """There is no C++ here."""
        raise NotImplementedError(ty)

    def get_benchmarker(self) -> Any:
        """There is no time here."""
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """A number by which Triton keeps compiled kernels apart."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The only stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Limits of the architecture."""
        return {"max_shared_mem": SHARED[self.arch]}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        """Module, function, registers, spills and threads: the emulator needs none of them."""
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a function that launches a compiled kernel."""
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        if path is None:
            raise EmulationError(f"{metadata.name}: Triton's cache has no PTX of it")
        kinds = list(source.signature.values())

        def launch(x: int, y: int, z: int, stream: Any, function: Any, packed: Any, launch_metadata: Any,
                   enter: Any, leave: Any, *arguments: Any) -> None:  # fmt: skip
            driver.active.launched[metadata.name] += 1  # Triton keeps this function for later drivers
            given = [(k, a) for k, a in zip(kinds, arguments, strict=True) if k != "constexpr"]
            emulate(path, given, (x, y, z), metadata.shared)

        return launch


@lru_cache(maxsize=32)  # an instruction is many objects, and garbage collection looks at all of them
def _program(path: str) -> tuple[Program, list[Block]]:
    program = parse(Path(path).read_text("utf-8"))
    return program, prepare(program)


def emulate(path: str, arguments: list[tuple[str, Any]], grid: tuple[int, int, int], shared: int) -> None:
    """Run a kernel for all programs of a grid.

    Args:
        path: file with the PTX.
        arguments: Triton type and value of each run-time argument.
        grid: number of programs along x, y and z.
        shared: bytes of shared memory per program.

    Raises:
        EmulationError: see the package.
    """
    program, blocks = _program(path)
    values = {name: _bits(kind, value) for (name, _), (kind, value) in zip(program.parameters, arguments, strict=False)}
    if len(program.parameters) - len(arguments) not in (0, 1, 2):  # Triton appends pointers to scratch memory
        raise EmulationError(f"{program.name}: {len(arguments)} arguments for {len(program.parameters)} parameters")
    values |= {name: 0 for name, _ in program.parameters[len(arguments) :]}
    given = [value for kind, value in arguments if kind.startswith("*") and value is not None]
    memory = GlobalMemory(given, _tensors, program.threads)
    places = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(grid)))]
    step = max(AT_ONCE // program.threads, 1)

    def execute(order: int) -> list[np.ndarray]:
        for first in range(0, len(places), step):
            machine = Machine(program, values, places[first : first + step], first, grid, shared, memory)
            run(machine, blocks, order)
        return memory.written()

    with np.errstate(all="ignore"), _of(program):
        results = execute(0)
        if (conflict := memory.conflict_of_programs()) is not None:
            raise EmulationError(f"programs access what another one writes: {conflict}")
        if (conflict := memory.conflict_of_warps()) is None:
            return
        # Harmless if a warp reads what it does not use, as where the threads of several warps hold the same values.
        for order in (1, -1):
            memory.undo()
            if any((a != b).any() for a, b in zip(results, execute(order), strict=True)):
                raise EmulationError(f"warps access what another one writes, and their order matters: {conflict}")


@contextmanager
def _of(program: Program) -> Iterator[None]:
    try:
        yield
    except EmulationError as error:
        raise EmulationError(f"{program.name}: {error}") from error


def _tensors() -> list[torch.Tensor]:
    """Every tensor of this process on the CPU: some kernels are given addresses in a table."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [x for x in gc.get_objects() if type(x) in kinds and x.layout == torch.strided and x.device.type == "cpu"]


def _bits(kind: str, value: Any) -> int:
    if kind.startswith("*"):
        return 0 if value is None else int(value.data_ptr())
    if kind in ("fp32", "fp64"):
        return float_bits(float(value), f"f{kind[2:]}")
    return int(value)


@contextmanager
def emulated(arch: int) -> Iterator[EmulatedGPU]:
    """Launches of Triton kernels inside are compiled for ``sm_<arch>`` and emulated."""
    gpu, before = EmulatedGPU(arch), driver._active  # reset_active() would ask for a real device
    driver.set_active(gpu)
    try:
        yield gpu
    finally:
        driver._active = before

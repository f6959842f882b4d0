"""Ahead-of-time compilation of Triton kernels without a GPU, and analysis of their machine code.

An operation lists the kernels worth compiling in its ``specimens.py``. ``python -m pixelflow_kernels.aot`` tabulates
all of them, and the tests check each one's promises. Instructions are counted as they occur in the listing, that is,
per thread. Nothing here runs a kernel.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .listing import Instruction, loops, parse

MATRIX = ("HMMA", "HGMMA", "IMMA", "DMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
FUSED = ("FFMA", "UFFMA", "DFMA")  # HFMA2 is excluded, because ptxas also uses it to move constants


@dataclass(frozen=True, kw_only=True, slots=True)
class Promises:
    """Requirements on a specimen's machine code; None means no requirement.

    Attributes:
        spills: maximum number of loads and stores of local memory.
        wide_loads: minimum number of 16-byte loads from global memory (a 32-byte load counts twice).
        narrow: maximum number of loads and stores of global memory of 2 bytes or fewer, a sign of lost alignment.
        matrix: whether there must be matrix instructions.
        ffma: maximum number of fused multiply-adds; 0 for level A.
        flushes: maximum number of operations that treat denormals as zero; 0 for level A.
        per_score: maximum number of main-loop instructions per attention score.
        registers: maximum number of registers per thread.
        shared: maximum number of bytes of shared memory.
    """

    spills: int | None = 0
    wide_loads: int | None = None
    narrow: int | None = None
    matrix: bool = False
    ffma: int | None = None
    flushes: int | None = None
    per_score: float | None = None
    registers: int | None = None
    shared: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Specimen:
    """One kernel with one choice of argument types, constants and compiler options.

    Attributes:
        name: ``"op.kernel/type/shape"``, e.g. ``"rope2d.forward/bf16/c1152-d72"``; unique.
        kernel: the function decorated with ``@triton.jit``.
        types: types of the run-time arguments, e.g. ``"*bf16"``, ``"i32"``, ``"fp32"``.
        constants: values of the constexpr arguments.
        options: ``num_warps``, ``num_stages``, ``enable_fp_fusion``.
        unaligned: pointers and strides that are not assumed to be multiples of 16; all others are. (Pointers and
            strides are recognised by name: ``*_ptr``, or containing ``stride``.)
        promises: requirements on the machine code.
        scores_per_thread: attention scores that a thread computes in one iteration of the main loop:
            ``BLOCK_M * BLOCK_N / (32 * num_warps)``.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    unaligned: tuple[str, ...] = ()
    promises: Promises = Promises()
    scores_per_thread: float | None = None


@dataclass(frozen=True)
class Report:
    """Resources and instructions of a kernel on one architecture.

    Attributes:
        registers: registers per thread.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory per program.
        opcodes: number of occurrences of each instruction, by full name.
        main_loop: the same for the innermost loop with matrix instructions, or None. Among several such loops, it is
            the one with the most matrix instructions, and among equals the one with the fewest instructions: masked
            and unmasked variants of a loop compute the same products, and most iterations are unmasked.
        cubin: the binary.
        flushes: operations of the PTX that take denormals for 0. (In machine code many more are named so: roots and
            quotients to the nearest scale their operands first, and are exact all the same.)
        scores_per_thread: as in the specimen.
    """

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]
    main_loop: Counter[str] | None
    cubin: bytes = field(repr=False)
    flushes: int = 0
    scores_per_thread: float | None = None

    def count(self, *prefixes: str) -> int:
        """Count the instructions named by ``prefixes``, with or without modifiers: FFMA includes FFMA.FTZ."""
        return count(self.opcodes, *prefixes)

    @property
    def instructions(self) -> int:
        """Number of instructions, without padding."""
        return self.opcodes.total() - self.opcodes["NOP"]

    @property
    def spills(self) -> int:
        """Number of loads and stores of local memory."""
        return self.count("LDL", "STL")

    @property
    def ffma(self) -> int:
        """Number of fused multiply-adds in fp32 (packed ones included) and fp64."""
        return self.count("FFMA", "FFMA2", *FUSED)

    @property
    def matrix(self) -> dict[str, int]:
        """Number of matrix instructions by family, e.g. ``{"HGMMA": 24}``."""
        return {family: n for family in MATRIX if (n := self.count(family))}

    @property
    def wide_loads(self) -> int:
        """Number of 16-byte loads from global memory, including asynchronous copies; 32-byte loads count twice."""
        return sum(_sixteens(name) * n for name, n in self.opcodes.items())

    @property
    def narrow(self) -> int:
        """Number of loads and stores of global memory of 2 bytes or fewer."""
        small = {"U8", "S8", "U16", "S16"}
        return sum(n for name, n in self.opcodes.items() if name[:4] in ("LDG.", "STG.") and small & {*name.split(".")})

    @property
    def per_score(self) -> float | None:
        """Main-loop instructions per attention score; None without a main loop or ``scores_per_thread``."""
        if self.main_loop is None or self.scores_per_thread is None:
            return None
        return self.main_loop.total() / self.scores_per_thread

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the binary."""
        return hashlib.sha256(self.cubin).hexdigest()

    def broken(self, promises: Promises) -> list[str]:
        """Describe each broken promise: what was found and what was promised."""
        at_most = {
            "spills": self.spills,
            "narrow": self.narrow,
            "ffma": self.ffma,
            "flushes": self.flushes,
            "per_score": self.per_score,
            "registers": self.registers,
            "shared": self.shared,
        }
        found = []
        for name, got in at_most.items():
            limit = getattr(promises, name)
            if limit is not None and (got is None or got > limit):
                found.append(f"{name}: got {'no main loop' if got is None else f'{got:g}'}, promised at most {limit:g}")
        if promises.wide_loads is not None and self.wide_loads < promises.wide_loads:
            found.append(f"wide_loads: got {self.wide_loads}, promised at least {promises.wide_loads}")
        if promises.matrix and not self.matrix:
            found.append("matrix: got no matrix instruction, promised some")
        return found


def count(opcodes: Mapping[str, int], *prefixes: str) -> int:
    """Count the instructions whose name is one of ``prefixes``, or starts with one of them followed by a dot."""
    wanted = {*prefixes}
    dotted = tuple(f"{prefix}." for prefix in prefixes)
    return sum(n for name, n in opcodes.items() if name in wanted or name.startswith(dotted))


def _sixteens(name: str) -> int:
    family, *modifiers = name.split(".")
    if family not in ("LDG", "LDGSTS"):
        return 0
    return 2 if "256" in modifiers else int("128" in modifiers)


def compile_specimen(specimen: Specimen, arch: int) -> Report:
    """Compile for an architecture (80, 90, 100) with the installed Triton and its bundled ptxas; no GPU is needed.

    Raises:
        ValueError: the specimen names an argument that the kernel does not have, or omits one.
        RuntimeError: kernels are interpreted in this process (``TRITON_INTERPRET=1``).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(specimen.kernel, triton.JITFunction):
        raise RuntimeError(f"{specimen.name}: got {type(specimen.kernel).__name__}, expected a compiled kernel")
    names = specimen.kernel.arg_names
    _check_arguments(specimen, names)
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in specimen.types and name not in specimen.unaligned and (name.endswith("_ptr") or "stride" in name)
    }
    source = ASTSource(
        fn=specimen.kernel,
        signature={name: specimen.types.get(name, "constexpr") for name in names},
        constexprs=dict(specimen.constants),
        attrs=divisible,
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it holds the paths of sources, and the digest would too
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(specimen.options))
    cubin: bytes = compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run_tool("cuobjdump", "-res-usage", path)
        text = run_tool("cuobjdump", "-sass", path)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    instructions = parse(text)
    return Report(
        registers=found["REG"],
        stack=found["STACK"],
        shared=compiled.metadata.shared,
        opcodes=Counter(i.name for i in instructions),
        main_loop=main_loop(instructions),
        cubin=cubin,
        flushes=len(re.findall(r"\.ftz\b", compiled.asm["ptx"])),
        scores_per_thread=specimen.scores_per_thread,
    )


def main_loop(instructions: list[Instruction]) -> Counter[str] | None:
    """Count the opcodes of the innermost loop with matrix instructions (see :class:`Report`); None without one."""
    bodies = [body for body in loops(instructions) if count(Counter(instructions[i].name for i in body), *MATRIX)]
    innermost = [body for body in bodies if not any(other < body for other in bodies)]
    found = [Counter(instructions[i].name for i in body) for body in innermost]
    return min(found, key=lambda opcodes: (-count(opcodes, *MATRIX), opcodes.total()), default=None)


def _check_arguments(specimen: Specimen, names: list[str]) -> None:
    given = [*specimen.types, *specimen.constants]
    if unknown := sorted({*given, *specimen.unaligned} - {*names}):
        raise ValueError(f"{specimen.name}: got {', '.join(unknown)}, expected arguments of the kernel")
    if missing := sorted({*names} - {*given}):
        raise ValueError(f"{specimen.name}: got no type or constant for {', '.join(missing)}")


def run_tool(name: str, *arguments: str | Path) -> str:
    """Run a binary utility from the Triton wheel (``ptxas``, ``cuobjdump``, ``nvdisasm``) and return its output."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout

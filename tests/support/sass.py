"""Compile a Triton kernel for a GPU that is not there, and read its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Report:
    """What a kernel takes on one architecture; ``opcodes`` counts instructions by their full name."""

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefixes))

    @property
    def spills(self) -> int:
        return self.count("LDL", "STL")


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int, **options: Any
) -> Report:
    """Compile ``kernel`` with ``types`` of its run-time arguments, all pointers and strides divisible by 16."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr") or "stride" in name
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        text = _tool("cuobjdump", "-sass", cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    return Report(found["REG"], found["STACK"], compiled.metadata.shared, Counter(opcodes))


def _tool(name: str, *arguments: Any) -> str:
    return subprocess.run([BINARIES / name, *arguments], check=True, capture_output=True, text=True).stdout

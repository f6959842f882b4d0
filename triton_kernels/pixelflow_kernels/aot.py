"""Compile the specimens of every operation ahead of time, without a GPU, and check the promises they make.

    python -m pixelflow_kernels.aot --arch sm_80,sm_90,sm_100 [--op rope2d] [--json FILE] [--cubins FOLDER]

Prints a table and exits with status 1 if a specimen breaks a promise or does not compile. An operation takes part by
providing a module ``specimens`` with a function ``specimens(arch)`` (see :mod:`pixelflow_kernels.machine_code`).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pixelflow_kernels

from .configs import ARCHITECTURES
from .machine_code import Report, Specimen, compile_specimen, run_tool

COLUMNS = (
    "specimen", "arch", "reg", "spill", "stack", "shared", "instr", "ffma", "ldg16", "narrow", "matrix", "loop",
    "/score",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """The result for one specimen on one architecture; ``report`` is None if it did not compile."""

    specimen: Specimen
    arch: int
    report: Report | None
    broken: tuple[str, ...]

    @property
    def op(self) -> str:
        """Name of the operation."""
        return self.specimen.name.partition(".")[0]

    def cells(self) -> tuple[str, ...]:
        """Return the row's table cells in the order of ``COLUMNS``."""
        name, r = (self.specimen.name, f"sm_{self.arch}"), self.report
        if r is None:
            return *name, *["-"] * (len(COLUMNS) - 2)
        numbers = (r.registers, r.spills, r.stack, r.shared, r.instructions, r.ffma, r.wide_loads, r.narrow)
        matrix = " ".join(f"{n} {family}" for family, n in r.matrix.items())
        loop = "-" if r.main_loop is None else str(r.main_loop.total())
        score = "-" if r.per_score is None else f"{r.per_score:.2f}"
        return *name, *map(str, numbers), matrix or "-", loop, score

    def record(self) -> dict[str, Any]:
        """Return the row's entry in the JSON file."""
        found: dict[str, Any] = {"specimen": self.specimen.name, "op": self.op, "arch": f"sm_{self.arch}"}
        if (r := self.report) is not None:
            found |= {
                "registers": r.registers,
                "spills": r.spills,
                "stack": r.stack,
                "shared": r.shared,
                "instructions": r.instructions,
                "ffma": r.ffma,
                "wide_loads": r.wide_loads,
                "narrow": r.narrow,
                "matrix": r.matrix,
                "main_loop": None if r.main_loop is None else r.main_loop.total(),
                "per_score": None if r.per_score is None else round(r.per_score, 3),
                "sha256": r.digest,
            }
        return found | {"broken": list(self.broken)}


def operations() -> list[str]:
    """List the names of the sub-packages that have specimens."""
    package = pixelflow_kernels.__name__
    found = [m.name for m in pkgutil.iter_modules(pixelflow_kernels.__path__) if m.ispkg]
    return sorted(name for name in found if importlib.util.find_spec(f"{package}.{name}.specimens"))


def specimens_of(op: str, arch: int) -> Iterator[Specimen]:
    """Yield the specimens of one operation for one architecture.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in (known := operations()):
        raise ValueError(f"op: got {op!r}, expected one of {', '.join(known)}")
    module = importlib.import_module(f"{pixelflow_kernels.__name__}.{op}.specimens")
    yield from module.specimens(arch)


def examine(specimen: Specimen, arch: int) -> Row:
    """Compile one specimen and check its promises; a compiler error counts as a broken promise."""
    try:
        report = compile_specimen(specimen, arch)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Row(specimen, arch, None, (f"does not compile: {type(error).__name__}: {lines[-1]}",))
    return Row(specimen, arch, report, tuple(report.broken(specimen.promises)))


def versions() -> dict[str, str]:
    """Return the versions of everything that determines the machine code."""
    import triton

    found = {"triton": triton.__version__}
    for tool in ("ptxas", "ptxas-blackwell"):
        try:
            found[tool] = re.findall(r"V(\d[\d.]*)", run_tool(tool, "--version"))[-1]
        except (OSError, IndexError):
            found[tool] = "none"
    return found


def table(rows: Iterable[Row]) -> str:
    """Format rows as a plain-text table: names left-aligned, numbers right-aligned."""
    cells = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def kept_entries(report: Path, ops: Sequence[str], architectures: Sequence[int]) -> list[dict[str, Any]]:
    """Return a report's entries for other operations and architectures than these; none if there is no such file.

    Raises:
        ValueError: there are some, made by other versions.
    """
    if not report.exists():
        return []
    found = json.loads(report.read_text("utf-8"))
    replaced = {f"sm_{arch}" for arch in architectures}
    kept = [entry for entry in found["specimens"] if entry["op"] not in ops or entry["arch"] not in replaced]
    if kept and found["versions"] != (here := versions()):
        raise ValueError(f"{report}: got figures of {found['versions']}, expected those of {here}")
    return kept


def write_report(rows: Iterable[Row], others: Iterable[dict[str, Any]], report: Path) -> None:
    """Write rows and other entries with the versions of now, ordered by architecture and operation."""
    entries = [row.record() for row in rows] + [*others]
    entries.sort(key=lambda entry: (int(entry["arch"].removeprefix("sm_")), entry["op"]))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps({"versions": versions(), "specimens": entries}, indent=1) + "\n", "utf-8")


def write_cubins(rows: Iterable[Row], folder: Path) -> None:
    """Write binaries such as ``FOLDER/sm_90/rope2d.forward-bf16-c1152-d72.cubin``, and their ``FOLDER/SHA256SUMS``."""
    sums = []
    for row in rows:
        if row.report is None:
            continue
        name = Path(f"sm_{row.arch}", re.sub(r"[^\w.+=-]", "-", row.specimen.name) + ".cubin")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(row.report.cubin)
        sums.append(f"{row.report.digest}  {name.as_posix()}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "SHA256SUMS").write_text("".join(sorted(sums, key=lambda line: line.split()[1])), "utf-8")


def main(arguments: Sequence[str] | None = None, find: Callable[[str, int], Iterable[Specimen]] = specimens_of) -> int:
    """Run the command; ``find`` exists for tests.

    Returns:
        The exit status: 0, 1 if a promise is broken, or 2 under Triton's interpreter or if other versions made the
        figures in the file that these are to be added to.
    """
    options = _parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: interpreted kernels have no machine code", file=sys.stderr)
        return 2
    chosen = options.op or operations()
    try:
        others = kept_entries(options.json, chosen, options.arch) if options.json else []
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    rows: list[Row] = []
    for arch in options.arch:
        for op in chosen:
            for specimen in find(op, arch):
                rows.append(examine(specimen, arch))
                if sys.stderr.isatty():
                    print(f"\r{len(rows)} compiled", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    print(table(rows))
    if options.json:
        write_report(rows, others, options.json)
    if options.cubins:
        write_cubins(rows, options.cubins)
    broken = [row for row in rows if row.broken]
    for row in broken:
        print(f"BROKEN {row.specimen.name} on sm_{row.arch}: {'; '.join(row.broken)}")
    print(f"{len(rows)} specimens, {len(broken)} with broken promises")
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pixelflow_kernels.aot", description=(__doc__ or "").split("\n")[0])
    every = ",".join(f"sm_{arch}" for arch in ARCHITECTURES)
    parser.add_argument("--arch", type=_architectures, default=every, help=f"comma-separated; default {every}")
    parser.add_argument("--op", action="append", choices=operations(), help="may be repeated; default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures, digests and versions; others in FILE stay")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="store the binaries and SHA256SUMS here")
    return parser


def _architectures(text: str) -> list[int]:
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"sm_\d{2,3}", name) for name in names):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names like sm_90, comma-separated")
    return [int(name[3:]) for name in names]


if __name__ == "__main__":
    sys.exit(main())

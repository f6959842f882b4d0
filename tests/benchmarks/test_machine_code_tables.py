"""Tables of machine code in pages, from reports of ahead-of-time compilation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixelflow_benchmarks.analysis.machine_code import SHOWN
from pixelflow_benchmarks.analysis.pages import fill
from pixelflow_kernels import aot

FIGURES = {"registers": 40, "spills": 0, "instructions": 321, "ffma": 7, "wide_loads": 5, "shared": 1024}


def entry(specimen: str, arch: str, **changes: Any) -> dict[str, Any]:
    loop = {"matrix": {"HGMMA": 3, "HMMA": 2}, "per_score": 4.857, "broken": []}
    return {"specimen": specimen, "op": specimen.split(".")[0], "arch": arch} | FIGURES | loop | changes


def write(path: Path, triton: str, *entries: dict[str, Any]) -> None:
    versions = {"triton": triton, "ptxas": "12.8", "ptxas-blackwell": "13.1"}
    path.write_text(json.dumps({"versions": versions, "specimens": entries}))


def table(name: str, *reports: str, root: Path) -> list[list[str]]:
    page = fill(f"<!-- table: {name} {' '.join(reports)} -->\n<!-- /table -->\n", root)
    return [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|") and "---" not in line]


def test_operations(tmp_path: Path) -> None:
    shown = [f"adamw.{name}" for name in SHOWN["adamw"]]
    sizes = {"sm_100": 5, "sm_80": 80, "sm_90": 90}
    entries = [entry(name, arch, instructions=n, ffma=n) for name in [*shown, "adamw.x"] for arch, n in sizes.items()]
    write(tmp_path / "a.json", "3.7", *entries)
    header, *rows = table("machine-code-adamw", "a.json", root=tmp_path)
    assert header == ["specimen", "sm_80", "sm_90", "sm_100", "16-byte loads (sm_90)", "`ffma` (sm_90)"]
    assert rows == [[name, "40 / 80", "40 / 90", "40 / 5", "5", "90"] for name in SHOWN["adamw"]]
    write(tmp_path / "a.json", "3.7", *(e for e in entries if e["specimen"] != shown[0]))
    with pytest.raises(KeyError, match=shown[0]):
        table("machine-code-adamw", "a.json", root=tmp_path)


def test_attention_is_counted_by_score(tmp_path: Path) -> None:
    for triton, score in (("3.6", 5.0), ("3.7", 4.0)):
        entries = [
            entry(f"varlen_attention.{name}", arch, per_score=score)
            for name in SHOWN["varlen_attention"]
            for arch in ("sm_80", "sm_90")
        ]
        write(tmp_path / f"{triton}.json", triton, *entries)
    header, row, *_ = table("machine-code-varlen_attention", "3.7.json", root=tmp_path)
    assert header == ["specimen", "sm_80", "sm_90", "matrix instructions (sm_90)", "shared bytes (sm_90)"]
    assert row == [SHOWN["varlen_attention"][0], "40 / 4.00", "40 / 4.00", "5", "1024"]
    header, row, *_ = table("machine-code-attention", "3.6.json", "3.7.json", root=tmp_path)
    assert header == ["specimen", "Triton 3.6", "Triton 3.7"]
    assert row == [SHOWN["varlen_attention"][0], "40 / 5.00", "40 / 4.00"]


def test_what_breaks_and_spills_is_counted(tmp_path: Path) -> None:
    failed = {"specimen": "adamw.c", "op": "adamw", "arch": "sm_80", "broken": ["does not compile"]}
    entries = [
        entry("adamw.a", "sm_80", spills=3),
        entry("adamw.b", "sm_80", spills=1, broken=["spills: got 1"]),
        entry("rope2d.a", "sm_90", spills=1),
    ]
    write(tmp_path / "3.6.json", "3.6", *entries, failed)
    write(tmp_path / "3.7.json", "3.7", entry("adamw.a", "sm_80"))
    _, old, new = table("machine-code", "3.6.json", "3.7.json", root=tmp_path)
    assert old == ["3.6", "12.8", "13.1", "3", "1", "2 (2 adamw sm_80)", "3 (2 adamw sm_80, 1 rope2d sm_90)"]
    assert new == ["3.7", "12.8", "13.1", "1", "0", "0", "0"]


@pytest.mark.parametrize("op", aot.operations())
def test_every_operation_has_a_table(op: str) -> None:
    assert SHOWN[op]

"""Tables of what the compiler made of the kernels, from reports of ``python -m pixelflow_kernels.aot``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixelflow_benchmarks.harness.tables import TextTable

SHOWN: Mapping[str, tuple[str, ...]] = {
    "rope2d": (
        "rotate/bf16/c1152-d72",
        "forward/bf16/c1152-d72",
        "forward_cross/bf16/c1152-d72",
        "backward/bf16/c1152-d72",
        "rotate/fp32/c1152-d72",
        "forward/fp32/c1152-d72",
        "backward/fp32/c1152-d72",
    ),
    "cascade": (
        "renoise_given/fp32/w64",
        "renoise_given/bf16/w64",
        "renoise/fp32/w64",
        "renoise/bf16/w64",
        "initial/fp32/all",
        "pairs_given/fp32-fp32/s1",
        "pairs/u8-bf16/s1",
        "pairs/u8-bf16/s4",
    ),
    "modulate": (
        "forward.layer_norm_modulate/bf16/c1152",
        "forward.add_gated_rms_norm_modulate/bf16/c1152",
        "forward.add_gated_layer_norm_modulate/bf16/c1152",
        "forward.add_gated_rms_norm/bf16/c1152",
        "forward.add_rms_norm_modulate/bf16/c1152",
        "forward.add_gated_layer_norm_modulate/fp32/c1152",
        "backward.layer_norm_modulate/bf16/c1152",
        "backward.add_gated_rms_norm_modulate/bf16/c1152",
        "backward.add_gated_layer_norm_modulate/bf16/c1152",
        "backward.add_gated_layer_norm_modulate/fp32/c1152",
    ),
    "ode_step": (
        "euler/bf16/plain-dense",
        "euler/bf16/guided-dense",
        "euler/bf16/guided-w48",
        "euler/fp32/guided-dense",
        "start/bf16/guided-dense",
        "start/fp32/guided-dense",
        "probe/bf16/guided-dense",
        "probe/fp32/guided-dense",
        "stage1/fp32/plain-dense",
        "stage6/bf16/guided-dense",
        "stage6/bf16/guided-w48",
        "stage6/fp32/guided-dense",
        "stage6/fp32/guided-w48",
        "error/bf16/guided-dense",
        "error/fp32/guided-dense",
        "error/fp32/guided-w48",
        "accept/fp32/dense",
        "begin/fp64/any",
        "end/fp64/any",
        "finish/fp64/image",
        "finish/fp64/batch",
    ),
    "varlen_attention": (
        "forward-long/bf16/d72-aligned",
        "forward-long/bf16/d72",
        "forward-running-long/bf16/d72-aligned",
        "forward-short/bf16/d72-aligned",
        "forward-short/bf16/d72",
        "backward_keys/bf16/d72-aligned",
        "backward_keys/bf16/d72",
        "backward_queries/bf16/d72-aligned",
        "backward_queries/bf16/d72",
    ),
    "adamw": (
        "squares/fp32/all",
        "squares/bf16/all",
        "norm/fp64/all",
        "numbers/fp64/all",
        "update/fp32/averaged",
        "update/fp32/averaged-copied-zeroed",
        "update/bf16/averaged-copied",
    ),
}
"""Specimens in the tables, by operation, named without it."""

Entry = dict[str, Any]


def operation_table(op: str, report: Path) -> TextTable:
    """Tabulate an operation's specimens in ``SHOWN`` by architecture; for attention per score of its main loop.

    Raises:
        KeyError: the report lacks one of them.
    """
    versions, entries = _read(report)
    architectures = sorted({arch for _, arch in entries}, key=lambda arch: int(arch.removeprefix("sm_")))
    title, header, cells = _SCORES if op == "varlen_attention" else _INSTRUCTIONS
    rows = [(name, *cells({arch: entries[f"{op}.{name}", arch] for arch in architectures})) for name in SHOWN[op]]
    return TextTable(f"{title}; Triton {versions['triton']}.", ("specimen", *architectures, *header), tuple(rows))


def _instruction_cells(found: Mapping[str, Entry]) -> tuple[str, ...]:
    hopper = found["sm_90"]
    return (
        *(f"{entry['registers']} / {entry['instructions']}" for entry in found.values()),
        str(hopper["wide_loads"]),
        str(hopper["ffma"]),
    )


def _score_cells(found: Mapping[str, Entry]) -> tuple[str, ...]:
    hopper = found["sm_90"]
    return (*map(_per_score, found.values()), str(sum(hopper["matrix"].values())), str(hopper["shared"]))


def _per_score(entry: Entry) -> str:
    return f"{entry['registers']} / {entry['per_score']:.2f}"


_INSTRUCTIONS = ("Registers / instructions", ("16-byte loads (sm_90)", "`ffma` (sm_90)"), _instruction_cells)
_SCORES = (
    "Registers / main-loop instructions per score",
    ("matrix instructions (sm_90)", "shared bytes (sm_90)"),
    _score_cells,
)


def attention_table(*reports: Path) -> TextTable:
    """Tabulate attention's specimens in ``SHOWN`` on sm_90, with a column for each report's Triton."""
    read = [_read(report) for report in reports]
    rows = [
        (name, *(_per_score(entries[f"varlen_attention.{name}", "sm_90"]) for _, entries in read))
        for name in SHOWN["varlen_attention"]
    ]
    header = ("specimen", *(f"Triton {versions['triton']}" for versions, _ in read))
    return TextTable("Registers / main-loop instructions per score, sm_90.", header, tuple(rows))


def versions_table(*reports: Path) -> TextTable:
    """Tabulate how many specimens each Triton compiled, how many break a promise and how many spill."""
    rows = []
    for report in reports:
        versions, entries = _read(report)
        compiled = [entry for entry in entries.values() if "registers" in entry]
        rows.append(
            (
                versions["triton"],
                versions["ptxas"],
                versions["ptxas-blackwell"],
                str(len(compiled)),
                str(len(entries) - len(compiled)),
                _by_operation([entry for entry in entries.values() if entry["broken"]]),
                _by_operation([entry for entry in compiled if entry["spills"]]),
            )
        )
    header = ("Triton", "ptxas", "ptxas for sm_100", "compiled", "not compiled", "break a promise", "spill")
    return TextTable("Specimens of all operations, each on each architecture.", header, tuple(rows))


def _by_operation(entries: list[Entry]) -> str:
    """Format how many there are, and of which operations on which architectures."""
    groups: dict[tuple[str, str], int] = {}
    for entry in entries:
        place = (entry["op"], entry["arch"])
        groups[place] = groups.get(place, 0) + 1
    named = ", ".join(f"{n} {op} {arch}" for (op, arch), n in groups.items())
    return f"{len(entries)} ({named})" if entries else "0"


def _read(report: Path) -> tuple[dict[str, str], dict[tuple[str, str], Entry]]:
    """Read a report: versions, and entries by the specimen's name and architecture."""
    record = json.loads(report.read_text("utf-8"))
    return record["versions"], {(entry["specimen"], entry["arch"]): entry for entry in record["specimens"]}

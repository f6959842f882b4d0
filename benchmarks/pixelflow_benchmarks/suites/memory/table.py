"""Records of ``bench memory`` as a table."""

from __future__ import annotations

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable

MIB = 2**20


def memory_table(run: Run) -> TextTable:
    """A row per case and variant: weights, everything else at the peak, the peak, and what a further image adds."""
    rows = []
    for r in run.of_kind("memory"):
        if "fault" in r:
            rows.append((r["case"], r["variant"], "wrong: no figure", r["fault"], "", "", "", ""))
            continue
        columns = ("weights_bytes", "activation_bytes", "peak_bytes", "per_image_bytes")
        rows.append((r["case"], r["variant"], *(_mib(r, key) for key in columns), _beside(r), _how(r)))
    head = run.environment
    where = head.get("gpu") or head["processor"]
    title = (
        f"Memory, MiB; {where}; torch {head['torch']}. Rows that say counted are bytes of fake tensors in bf16, on a "
        "GPU that need not be there."
    )
    header = ("case", "variant", "weights", "beside them", "peak", "a further image", "of which / beside it", "")
    return TextTable(title, header, tuple(rows))


def _how(record: Record) -> str:
    return "counted" if record["counted"] else "measured"


def _mib(record: Record, key: str) -> str:
    return f"{record[key] / MIB:,.1f}" if key in record else ""


def _beside(record: Record) -> str:
    said = {
        "pool_bytes": "graphs",
        "gradient_bytes": "gradients",
        "reserved_bytes": "reserved",
        "resident_bytes": "process grew",
    }
    return ", ".join(f"{name} {_mib(record, key)}" for key, name in said.items() if key in record)

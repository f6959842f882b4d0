"""Records of ``bench profile`` as tables."""

from __future__ import annotations

from collections.abc import Iterator

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable

LONGEST_NAME = 64

NAMES = {
    "products": "matrix products",
    "pointwise": "pointwise, norms, sums",
    "copies": "copies, fills",
    "idle": "idle: between kernels",
}
ON_CPU = {"other": "views, allocations, other", "idle": "between operators"}


def profile_tables(run: Run, top: int) -> Iterator[TextTable]:
    """Yield two tables for each variant: its classes, then its longest kernels."""
    for measured in run.of_kind("measurement"):
        if measured["right"]:
            yield class_table(run, measured)
            yield kernel_table(run, measured, top)


def class_table(run: Run, measured: Record) -> TextTable:
    """A row per class: milliseconds per evaluation of the whole batch, and their floor."""
    names = NAMES | ({} if "gpu" in run.environment else ON_CPU)
    scale = 1000 / measured["evaluations"]
    rows = []
    for r in _of(run, "class", measured):
        floor = r.get("floor_seconds")
        name: str = r["class"]
        rows.append(
            (
                names.get(name, name),
                str(r["calls"]) if r["calls"] else "",
                f"{scale * r['seconds']:.3f}",
                f"{100 * r['share_of_wall']:.1f} %",
                "" if floor is None else f"{scale * floor:.3f}",
                "" if floor is None or not r["seconds"] else f"{100 * floor / r['seconds']:.0f} %",
            )
        )
    head = run.environment
    unprofiled = scale * measured["seconds"]["median"] * measured["batch"] * measured["evaluations"]
    device = f"{head.get('gpu', head['processor'])}, torch {head['torch']}"
    title = (
        f"{measured['variant']}, {measured['case']}, {head['shape']}, {head['dtype']}, {device}; ms of one of "
        f"{measured['evaluations']} evaluations, each {scale * measured['profiled_seconds']:.3f} ms, and "
        f"{unprofiled:.3f} without the profiler."
    )
    return TextTable(title, ("class", "calls", "ms", "of wall time", "floor, ms", "floor reached"), tuple(rows))


def kernel_table(run: Run, measured: Record, top: int) -> TextTable:
    """A row for each of the longest kernels; total and floor are those of the whole run."""
    rows = []
    for r in _of(run, "kernel", measured)[:top]:
        name = r["name"] if len(r["name"]) <= LONGEST_NAME else r["name"][: LONGEST_NAME - 3] + "..."
        rows.append(
            (
                name,
                r["class"],
                str(r["calls"]),
                f"{1000 * r['seconds']:.3f}",
                f"{100 * r['share_of_busy']:.1f} %",
                f"{1e6 * r['mean_seconds']:.1f}",
                f"{1000 * r['floor_seconds']:.3f}" if "floor_seconds" in r else "",
            )
        )
    what = "kernels" if "gpu" in run.environment else "operators"
    title = f"{measured['variant']}, {measured['case']}: the longest {what} of a run of {measured['steps']} steps."
    header = ("name", "class", "calls", "total ms", "of busy time", "mean us", "floor, ms")
    return TextTable(title, header, tuple(rows))


def _of(run: Run, kind: str, measured: Record) -> list[Record]:
    whose = (measured["case"], measured["variant"])
    return [r for r in run.of_kind(kind) if (r["case"], r["variant"]) == whose]

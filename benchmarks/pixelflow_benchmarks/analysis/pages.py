"""Tables in Markdown pages, filled in from result files.

A page marks the place of a table and names its source::

    <!-- table: stages benchmarks/results/nvidia-h100-80gb-hbm3 -->
    <!-- /table -->

The table's name is followed by a result file or a device's folder. A suite's table shows the newest complete run there
with the command's default options, so that trying something out changes no page. If there is no such run, it shows the
newest run of all, and the line below the table says what that run lacks. If there is no run, the page says that it was
not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pixelflow_benchmarks.harness.results import Run, read_runs, result_files, to_show
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_benchmarks.harness.targets import budget_table
from pixelflow_benchmarks.quality.ablations.table import TABLES as ABLATIONS
from pixelflow_benchmarks.quality.table import again_table, quality_table
from pixelflow_benchmarks.suites.gate.spread import spread_table

from .compare import agreement_table
from .machine_code import SHOWN, attention_table, operation_table, versions_table
from .suite_tables import OF_SUITES

PLACE = re.compile(r"(<!-- table: (\S+)((?: [^>\s]+)*) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

OF_NOTHING: Mapping[str, Callable[[], TextTable]] = {"targets": budget_table}
"""Tables of the project's targets, which come from no results and have no source."""
OF_EVALUATIONS: Mapping[str, Callable[..., TextTable]] = {
    "quality": quality_table,
    "again": again_table,
    "gate-spread": spread_table,
}
"""Tables from lines of files that are not runs of a suite: evaluations, and repeated ratios of the gate."""
OF_PAIRS: Mapping[str, Callable[[Sequence[Run], Sequence[Run]], TextTable]] = {"agreement": agreement_table}
"""Tables from the runs of two result files."""
OF_REPORTS: Mapping[str, Callable[..., TextTable]] = {
    "machine-code": versions_table,
    "machine-code-attention": attention_table,
    **{f"machine-code-{op}": partial(operation_table, op) for op in SHOWN},
}
"""Tables from reports of ahead-of-time compilation."""
OF_RUNS: Mapping[str, Callable[[Sequence[Run]], TextTable]] = ABLATIONS
"""Tables from all runs of result files together, because each run continued what those before it had left."""


def fill(page: str, root: Path) -> str:
    """Return the page with every table filled in anew.

    Args:
        page: Markdown.
        root: folder that the sources' paths are relative to.

    Raises:
        ValueError: a table's name is unknown, or a source cannot be read.
    """
    return PLACE.sub(lambda found: f"{found[1]}{_table(found[2], found[3].split(), root)}{found[5]}", page)


def _table(name: str, sources: list[str], root: Path) -> str:
    paths = [root / source for source in sources]
    if name in OF_NOTHING:
        return OF_NOTHING[name]().markdown()
    if name in OF_EVALUATIONS:
        evaluations = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in paths]
        return OF_EVALUATIONS[name](*evaluations).markdown()
    if name in OF_REPORTS:
        return OF_REPORTS[name](*paths).markdown()
    if name in OF_PAIRS:
        return OF_PAIRS[name](*(read_runs(path) for path in paths)).markdown()
    if name in OF_RUNS:
        runs = [run for path in paths if path.exists() for run in read_runs(path)]
        absent = f"Not measured: no run of `pixelflow eval ablations` in {', '.join(sources)}.\n"
        return OF_RUNS[name](runs).markdown() if runs else absent
    if name not in OF_SUITES:
        known = ", ".join([*OF_SUITES, *OF_EVALUATIONS, *OF_REPORTS, *OF_PAIRS, *OF_RUNS, *OF_NOTHING])
        raise ValueError(f"table: got {name!r}, expected one of {known}")
    files = [file for path in paths for file in ([path] if path.is_file() else result_files(path))]
    run = to_show([run for file in files for run in read_runs(file)], name)
    if run is None:
        return f"Not measured: no run of `pixelflow bench {name}` in {', '.join(sources)}.\n"
    table = OF_SUITES[name](run)
    return replace(table, title=" ".join([table.title, *run.lacks])).markdown()

"""Records of ``bench kernels`` as a table."""

from __future__ import annotations

import re

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable, interval
from pixelflow_benchmarks.harness.targets import kernel_cell

from .case import STAGE_SIDES
from .measure import EAGER

OURS, BACKWARD = "ours", "+backward"


def kernel_table(run: Run) -> TextTable:
    """A row per case and variant: time, rates, how many times faster than eager PyTorch, and the target of ours."""
    environment, ceilings = run.environment, run.of_kind("ceilings")[0]
    rows = []
    for r in run.records:
        if r["kind"] == "absent":
            rows.append((r["case"], r["variant"], r["reason"], "", "", "", ""))
        elif r["kind"] == "measurement" and not r["right"]:
            rows.append((r["case"], r["variant"], "wrong: no speed", "", "", "", ""))
        elif r["kind"] == "measurement":
            launched = "gpu" in environment and not r.get("captured", True)
            rows.append(
                (
                    r["case"],
                    f"{r['variant']}, launches included" if launched else r["variant"],
                    interval(r["seconds"], 1e6, 1),
                    f"{r['gigabytes_per_second']:.0f} ({100 * r['fraction_of_copy']:.0f} %)",
                    f"{r['teraflops']:.1f} ({100 * r['fraction_of_product']:.0f} %)" if "teraflops" in r else "",
                    interval(r["times"][EAGER], 1, 2) if "times" in r else "",
                    _target(run, r) if r["variant"] == OURS else "",
                )
            )
    title = (
        f"{environment.get('gpu', 'CPU, only to try the command out')}, {environment['dtype']}, batch "
        f"{environment['batch']}, torch {environment['torch']}; copy {ceilings['bytes_per_second'] / 1e9:.0f} GB/s, "
        f"product {ceilings['flops_per_second'] / 1e12:.1f} TFLOP/s."
    )
    header = ("case", "variant", "us", "GB/s (of copy)", "TFLOP/s (of product)", "times eager's speed", "target")
    return TextTable(title, header, tuple(rows))


def _target(run: Run, record: Record) -> str:
    """Return the kernel's target with the verdict; empty if the case has no stage, or a backward pass no forward."""
    shape = re.search(r"/stage(\d)-b\d+$", record["case"])
    if shape is None:
        return ""
    before, both, _ = record["case"].partition(BACKWARD)
    forward = None
    if both:
        others = (r for r in run.of_kind("measurement") if r["variant"] == OURS and "seconds" in r)
        forward = next((r for r in others if r["case"] == f"{before}/{shape[0].removeprefix('/')}"), None)
        if forward is None:
            return ""
    return kernel_cell(run.environment, record, STAGE_SIDES[int(shape[1])] ** 2, forward)

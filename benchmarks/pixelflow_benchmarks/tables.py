"""Tables of results, for the terminal and for Markdown pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .tuning import Choice

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TextTable:
    """A title, a header and rows of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table as Markdown, its title as a line of text below."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.title}\n"


def quality_table(records: Sequence[Record]) -> TextTable:
    """A row per setting of an evaluation: mean and half the range over repeats; real digits and noise first.

    ``nearest`` holds two distances to the nearest training digit: the median and that of the nearest 1 %.
    """
    environment, judge, *scored = records
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in scored:
        groups[str(record.get("name", record["kind"]))].append(record)
    distances = f"{judge['held_out_nearest']:.2f} / {judge['held_out_nearest_low']:.2f}"
    rows: list[tuple[str, ...]] = [
        ("held-out digits", f"{100 * judge['held_out_accuracy_svm']:.1f} %", "", "", distances, "", "", "")
    ]
    for name, group in groups.items():
        # The real digits are the training set itself.
        newness = (
            ["", "", ""]
            if name == "real"
            else [
                " / ".join(spread([r[key] for r in group], 2) for key in ("nearest", "nearest_low")),
                spread([r["novelty"] for r in group], 2),
                spread([r["copies"] for r in group], 2),
            ]
        )
        rows.append(
            (
                {"real": "training digits", "noise": "uniform noise"}.get(name, name),
                spread([100 * r["agreement"] for r in group], 1) + " %",
                spread([r["frechet"] for r in group], 2),
                spread([r["frechet_scan"] for r in group], 1),
                *newness,
                str(group[0].get("evaluations", "")),
            )
        )
    generated = [r for r in scored if r["kind"] == "generated"]
    title = (
        f"{judge['train']} training digits, {judge['held_out']} held out; {generated[0]['count']} digits a set, "
        f"{1 + max(r['repeat'] for r in generated)} sets (mean ± half the range); torch {environment['torch']}."
    )
    header = ("digits", "agreement", "Fréchet", "Fréchet, scans", "nearest", "novelty", "copies", "evaluations")
    return TextTable(title, header, tuple(rows))


def kernel_table(records: Sequence[Record]) -> TextTable:
    """A row per case and variant: median time, quartiles, rates, and the time beside that of plain PyTorch."""
    environment, ceilings = records[0], records[1]
    rows = []
    medians = {(r["case"], r["variant"]): r["median"] for r in records if "median" in r}
    for r in records:
        if r["kind"] != "kernel":
            continue
        name = (r["case"], r["variant"])
        if "median" not in r:
            rows.append((*name, r.get("absent", "wrong: no speed"), "", "", "", ""))
            continue
        eager = medians.get((r["case"], "eager"))
        rows.append(
            (
                *name,
                f"{r['median'] * 1e6:.1f}",
                f"{r['low'] * 1e6:.1f} to {r['high'] * 1e6:.1f}",
                f"{r['gigabytes_per_second']:.0f} ({100 * r['fraction_of_copy']:.0f} %)",
                f"{r['teraflops']:.1f} ({100 * r['fraction_of_product']:.0f} %)" if "teraflops" in r else "",
                f"{eager / r['median']:.2f}" if eager else "",
            )
        )
    title = (
        f"{environment.get('gpu', 'CPU, only to try the command out')}, {environment['dtype']}, batch "
        f"{environment['batch']}, torch {environment['torch']}; copy "
        f"{ceilings['bytes_per_second'] / 1e9:.0f} GB/s, product {ceilings['flops_per_second'] / 1e12:.1f} TFLOP/s."
    )
    header = ("case", "variant", "us", "quartiles", "GB/s (of copy)", "TFLOP/s (of product)", "times eager's speed")
    return TextTable(title, header, tuple(rows))


def tuning_table(choices: Sequence[Choice], gpu: str) -> TextTable:
    """A row per shape class: what is there, what is proposed, and what that is decided on."""
    rows = []
    for c in choices:
        rows.append(
            (
                c.kernel,
                c.shape_class,
                _settings(c.present),
                _settings(c.chosen) if c.changed else "keep",
                "" if c.ratio is None else f"{c.ratio:.3f}",
                ", ".join(c.problems),
                f"{c.timed} of {c.tried}",
                "same" if c.same_bits else "other",
            )
        )
    header = ("kernel", "class", "present", "proposed", "of present time", "problems", "timed", "bits")
    return TextTable(f"Launch configurations, {gpu}; times are geometric means over problems.", header, tuple(rows))


def _settings(config: Mapping[str, int]) -> str:
    return " ".join(f"{key} {value}" for key, value in config.items())


def spread(values: list[float], digits: int) -> str:
    """Mean, and half the range where there are several."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"

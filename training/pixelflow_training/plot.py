"""Plots of runs: losses by stage, learning rate, gradient norm, speed, spikes and skipped steps."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pixelflow_engine.files import write_atomically

from .curves import Curve, RunCurves
from .look import PALETTE, plot_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE, WRONG = "#24292f", "#d8dce2", "#d1242f"
COLUMNS = 3
PANEL = (330, 220)
"""Width and height of a panel, in CSS pixels."""
MEASURES = {"lr": "learning rate", "grad_norm": "gradient norm", "images_per_second": "images per second"}
LOG_FROM = 5
"""Losses and norms whose largest value exceeds the smallest by more than this factor get a logarithmic axis."""


def save_plot(runs: Sequence[RunCurves], output: Path, smooth: float | None = None) -> None:
    """Plot runs on shared axes: a panel for each stage's loss, and one for each other measure.

    Args:
        runs: in the order of the legend.
        output: ``*.svg`` or ``*.png``; missing folders are made.
        smooth: width in steps of the window over which training losses are averaged; by default a thirtieth of the
            longest run.

    Raises:
        ValueError: ``output`` has another suffix, or ``smooth`` is negative or not finite.
        ImportError: Matplotlib is not installed.
    """
    if output.suffix not in (".svg", ".png"):
        raise ValueError(f"output: got {output}, expected a name that ends in .svg or .png")
    if smooth is None:
        smooth = max(run.last for run in runs) / 30
    elif not 0 <= smooth < math.inf:
        raise ValueError(f"smooth: got {smooth}, expected 0 or more steps")
    with _drawing():
        figure = _draw(runs, smooth)
        kind = output.suffix[1:]
        save = partial(
            figure.savefig,
            format=kind,
            dpi=144 if kind == "png" else 72,
            # Without metadata, the same log gives the same file.
            metadata={"Date": None, "Creator": None} if kind == "svg" else {"Software": None},
        )
        write_atomically(output, save)


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError("train plot needs matplotlib: the extra `report` (in a clone: make setup)") from error
    with style.context(["default", plot_style(INK, RULE)]), warnings.catch_warnings():
        # A run's name may contain characters that the font of a PNG lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def _draw(runs: Sequence[RunCurves], smooth: float) -> Figure:
    from matplotlib.figure import Figure

    stages = max(len(run.training) for run in runs)
    rows = math.ceil(stages / COLUMNS) + math.ceil(len(MEASURES) / COLUMNS)
    below = 22 * math.ceil(len(runs) / 2) + 42  # for the legend
    width, height = COLUMNS * PANEL[0], rows * PANEL[1] + below
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    grid = figure.add_gridspec(
        rows, COLUMNS, left=64 / width, right=1 - 14 / width, bottom=(below + 26) / height, top=1 - 26 / height,
        wspace=0.26, hspace=0.42,
    )  # fmt: skip
    last = max(run.last for run in runs)
    for stage in range(stages):
        axes = figure.add_subplot(grid[stage // COLUMNS, stage % COLUMNS])
        for number, run in enumerate(runs):
            if stage < len(run.training):
                _draw_stage(axes, run, stage, smooth, number)
        _finish(axes, f"loss, stage {stage}", last, log=True)
    for place, (measure, title) in enumerate(MEASURES.items()):
        axes = figure.add_subplot(grid[math.ceil(stages / COLUMNS) + place // COLUMNS, place % COLUMNS])
        for number, run in enumerate(runs):
            curve = run.measures[measure]
            _line(axes, curve, _color(number), f"run{number}-{measure}", linewidth=1.2)
        _finish(axes, title, last, log=measure == "grad_norm")
        axes.set_xlabel("step", fontsize=9)
    _legend(figure, runs)
    return figure


def _draw_stage(axes: Axes, run: RunCurves, stage: int, smooth: float, number: int) -> None:
    color, name = _color(number), f"run{number}-stage{stage}"
    raw, held_out, spikes = run.training[stage], run.held_out[stage], run.spikes[stage]
    _dots(axes, raw, color, f"{name}-raw", markersize=1.8, alpha=0.35)
    _line(axes, raw.smoothed(smooth), color, f"{name}-smoothed", linewidth=1.6)
    # Drawn above the training dots, which would hide the line.
    _line(axes, held_out, color, f"{name}-held-out", linewidth=0.9, marker="o", markersize=3.6,
          markerfacecolor="white", linestyle=(0, (4, 2)), zorder=3)  # fmt: skip
    _dots(axes, spikes, WRONG, f"{name}-spikes", marker="^", markersize=5.5, markeredgecolor=color, markeredgewidth=0.5)
    if run.skipped:
        # At the bottom of the panel, whatever the losses are.
        axes.plot(run.skipped, [0.02] * len(run.skipped), transform=axes.get_xaxis_transform(), linestyle="none",
                  marker="x", markersize=5, color=WRONG, gid=f"{name}-skipped", zorder=4)  # fmt: skip


def _line(axes: Axes, curve: Curve, color: str, name: str, **look: Any) -> None:
    if len(curve) == 1:
        look = {"marker": "o", "markersize": 3.6, **look}
    if len(curve):
        axes.plot(curve.steps, curve.values, color=color, gid=name, **look)


def _dots(axes: Axes, curve: Curve, color: str, name: str, marker: str = "o", **look: Any) -> None:
    if len(curve):
        look = {"markeredgewidth": 0, **look} if "markeredgecolor" not in look else look
        axes.plot(curve.steps, curve.values, color=color, gid=name, linestyle="none", marker=marker, **look)


def _finish(axes: Axes, title: str, last: int, log: bool) -> None:
    """Set title and ticks, and a logarithmic axis if requested and if positive values span more than ``LOG_FROM``."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    values = [
        float(y) for line in axes.lines if line.get_transform() == axes.transData for y in np.asarray(line.get_ydata())
    ]
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlim(0, last * 1.02)
    axes.grid(axis="y", alpha=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes.tick_params(labelsize=9)
    low, high = min(values, default=0.0), max(values, default=0.0)
    if log and low > 0 and high / low > LOG_FROM:
        axes.set_yscale("log")
        decades = math.log10(high / low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(min(0.0, low), high * 1.06 if high > 0 else 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:.4g}")


def _legend(figure: Figure, runs: Sequence[RunCurves]) -> None:
    """Draw two legends: runs by colour, and the meaning of the marks."""
    from matplotlib.lines import Line2D

    def mark(label: str, **look: Any) -> Line2D:
        return Line2D([], [], **{"color": INK, "label": label, **look})

    marks = [
        mark("training", linestyle="none", marker="o", markersize=2.5, markeredgewidth=0, alpha=0.6),
        mark("training, smoothed", linewidth=1.6),
        mark("held out", linewidth=0.9, linestyle=(0, (4, 2)), marker="o", markersize=3.6, markerfacecolor="white"),
    ]
    if any(len(curve) for run in runs for curve in run.spikes):
        marks.append(mark("spike", linestyle="none", marker="^", markersize=5, color=WRONG))
    if any(run.skipped for run in runs):
        marks.append(mark("step skipped", linestyle="none", marker="x", markersize=5, color=WRONG))
    height = figure.get_figheight() * 72
    names = [mark(f"{run.name} ({run.last} steps)", color=_color(n), linewidth=3) for n, run in enumerate(runs)]
    shared: dict[str, Any] = {"frameon": False, "fontsize": 10, "handlelength": 2.2}
    figure.legend(handles=marks, loc="lower center", bbox_to_anchor=(0.5, 0.0), ncols=len(marks), **shared)
    figure.legend(handles=names, loc="lower center", bbox_to_anchor=(0.5, 24 / height), ncols=2, **shared)


def _color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]

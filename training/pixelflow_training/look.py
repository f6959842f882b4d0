"""Shared style of all plots: colours that are distinguishable on white and on black, and unobtrusive axes."""

from __future__ import annotations

from typing import Any

PALETTE = ("#2f81c9", "#d9730d", "#2c9c69", "#8a6fd1", "#c2559d", "#1f9aae", "#9a8f1e", "#a8714b")
"""Series colours, for light and dark backgrounds. Red is reserved for errors, grey for the baseline of a comparison."""


def plot_style(ink: str, rule: str) -> dict[str, Any]:
    """Return Matplotlib settings.

    Args:
        ink: colour of text and of the baseline of a comparison.
        rule: colour of axes and grids.
    """
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "pixelflow",
        "text.parse_math": False,
        "font.size": 11,
        "text.color": ink,
        "axes.edgecolor": rule,
        "axes.labelcolor": ink,
        "axes.labelsize": 11,
        "axes.linewidth": 1,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "grid.color": rule,
        "grid.linewidth": 0.8,
        "lines.markersize": 5.5,
    }

"""How plots look, wherever they are drawn: colours that can be told apart on white and on black, and quiet axes."""

from __future__ import annotations

from typing import Any

PALETTE = ("#2f81c9", "#d9730d", "#2c9c69", "#8a6fd1", "#c2559d", "#1f9aae", "#9a8f1e", "#a8714b")
"""On white and on black alike; red is for what is wrong, grey for who sets the measure."""


def plot_style(ink: str, rule: str) -> dict[str, Any]:
    """Matplotlib's settings.

    Args:
        ink: colour of text and of what sets the measure.
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

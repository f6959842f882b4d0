"""Quantities as text with their unit, for the axes and tables of a report."""

from __future__ import annotations

import math

PREFIXES = ("n", "µ", "m", "", "k", "M", "G", "T", "P")


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """Format a value with ``digits`` significant digits and an SI prefix: ``24.2 ms``, ``412 TFLOP/s``.

    Bytes by themselves (``B``) have binary prefixes (powers of 1024).
    """
    if unit == "B":
        return size(value, digits)
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    # Round first: 0.9996 ms with three digits is 1.00 ms, not 1000 µs.
    power = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))) / 3)
    power = min(max(power, -3), 0 if unit == "s" else 5)
    return f"{_significant(value / 1000**power, digits)} {PREFIXES[power + 3]}{unit}"


def size(value: float, digits: int = 3) -> str:
    """Format a number of bytes: ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1000:
            return f"{_significant(value, digits)} {unit}"
        value /= 1024
    return f"{_significant(value, digits)} GiB"


def percent(fraction: float) -> str:
    """Format a fraction as ``69 %``; below ten per cent with one decimal."""
    return f"{100 * fraction:.{0 if abs(fraction) >= 0.0995 else 1}f} %"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    before = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))) + 1
    return f"{value:.{max(0, digits - before)}f}"

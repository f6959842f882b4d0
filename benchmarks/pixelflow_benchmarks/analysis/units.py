"""Quantities as text, with their unit: what the axes and tables of a report say."""

from __future__ import annotations

import math

PREFIXES = ("n", "µ", "m", "", "k", "M", "G", "T", "P")


def quantity(value: float, unit: str, digits: int = 3) -> str:
    """A value with so many significant digits and the prefix that keeps it short: ``24.2 ms``, ``412 TFLOP/s``.

    Bytes by themselves (``B``) are counted in powers of 1024.
    """
    if unit == "B":
        return size(value, digits)
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}"
    # Rounded first: 0.9996 ms has three digits as 1.00 ms, not as 1000 µs.
    power = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))) / 3)
    power = min(max(power, -3), 0 if unit == "s" else 5)
    return f"{_significant(value / 1000**power, digits)} {PREFIXES[power + 3]}{unit}"


def size(value: float, digits: int = 3) -> str:
    """Bytes: ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1000:
            return f"{_significant(value, digits)} {unit}"
        value /= 1024
    return f"{_significant(value, digits)} GiB"


def percent(fraction: float) -> str:
    """A fraction: ``69 %``, below ten with a digit more."""
    return f"{100 * fraction:.{0 if abs(fraction) >= 0.0995 else 1}f} %"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    before = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))) + 1
    return f"{value:.{max(0, digits - before)}f}"

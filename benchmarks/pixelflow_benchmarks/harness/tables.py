"""A table of results, for the terminal and for Markdown pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Run


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


def interval(of: Mapping[str, float], scale: float, digits: int) -> str:
    """``median (low to high)`` of a spread of repeats."""
    low, median, high = (f"{of[key] * scale:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def missing(run: Run) -> dict[str, list[str]]:
    """Who could not be had, by reason."""
    found: dict[str, list[str]] = {}
    for record in run.of_kind("absent"):
        found.setdefault(record["reason"], []).append(record["variant"])
    return found


def faults(run: Run) -> list[str]:
    """What was wrong, a line each."""
    return [f"{r['case']}, {r['variant']}: {r['fault']}" for r in run.records if "fault" in r]

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

    def without_empty(self) -> TextTable:
        """The table without the columns in which no row has anything; one without rows as it is."""
        kept = [place for place in range(len(self.header)) if any(row[place] for row in self.rows)]
        if not self.rows or len(kept) == len(self.header):
            return self
        header, *rows = (tuple(line[place] for place in kept) for line in (self.header, *self.rows))
        return TextTable(self.title, header, tuple(rows))

    def markdown(self) -> str:
        """The table as Markdown, its title as a line of text below; columns that are empty are left out."""
        table = self.without_empty()
        lines = [table.header, tuple("---" for _ in table.header), *table.rows]
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

"""Tables of results, for the terminal and for Markdown pages."""

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
        """Return the table without columns that are empty in every row; a table without rows is returned as it is."""
        kept = [place for place in range(len(self.header)) if any(row[place] for row in self.rows)]
        if not self.rows or len(kept) == len(self.header):
            return self
        header, *rows = (tuple(line[place] for place in kept) for line in (self.header, *self.rows))
        return TextTable(self.title, header, tuple(rows))

    def markdown(self) -> str:
        """Return the table as Markdown with its title as a line of text below it; empty columns are left out."""
        table = self.without_empty()
        lines = [table.header, tuple("---" for _ in table.header), *table.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.title}\n"


def interval(of: Mapping[str, float], scale: float, digits: int) -> str:
    """Format a spread of repeats as ``median (low to high)``."""
    low, median, high = (f"{of[key] * scale:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def missing(run: Run) -> dict[str, list[str]]:
    """Return the variants that could not run, by reason."""
    found: dict[str, list[str]] = {}
    for record in run.of_kind("absent"):
        found.setdefault(record["reason"], []).append(record["variant"])
    return found


def faults(run: Run) -> list[str]:
    """Describe each failed check in one line."""
    return [f"{r.get('case')}, {r.get('variant')}: {r['fault']}" for r in run.records if "fault" in r]

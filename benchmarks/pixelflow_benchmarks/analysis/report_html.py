"""HTML parts of a report. Text from result files is untrusted: all of it is escaped here, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import count, groupby

from pixelflow_benchmarks.harness.tables import TextTable

from .suite_plots import Figure
from .svg import numbered, swatch

Section = tuple[str, str, Sequence[tuple[str, str]]]
"""Identifier and name of a section, and those of its parts."""
SHORT = 28
"""Length up to which a row's name is not broken."""
_FIGURE = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?( .*)?$")


def text_of(value: object) -> str:
    """Escape a value as text of a page; also valid within an attribute."""
    return escape(str(value))


def table_html(
    table: TextTable, wrong: Collection[tuple[str, ...]] = (), absent: Collection[tuple[str, ...]] = ()
) -> str:
    """Return a table with its title. Numeric columns are aligned right; consecutive rows share an equal first cell.

    Args:
        table: the table.
        wrong: the first two cells of rows that are marked as wrong.
        absent: the first two cells of rows that are marked as absent.
    """
    table = table.without_empty()
    right = {
        place
        for place in range(1, len(table.header))
        if (cells := [row[place] for row in table.rows if row[place] and not row[place].startswith("wrong")])
        and sum(bool(_FIGURE.match(cell)) for cell in cells) > len(cells) / 2
    }
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {text_of(table.title)}">', "<table>"]
    lines += [f"<caption><span>{text_of(table.title)}</span></caption>", "<thead><tr>"]
    for place, name in enumerate(table.header):
        lines.append(f'<th scope="col"{_class("figure" if place in right else "")}>{text_of(name)}</th>')
    lines += ["</tr></thead>"]
    groups = [list(rows) for _, rows in groupby(table.rows, key=lambda row: row[0])]
    grouped = len(groups) < len(table.rows)
    for rows in groups if grouped else [list(table.rows)]:
        lines.append("<tbody>")
        for number, row in enumerate(rows):
            cells = []
            if grouped and number == 0:
                cells = [f'<th scope="rowgroup" rowspan="{len(rows)}">{_breakable(row[0])}</th>']
            elif not grouped:
                cells = [f'<th scope="row">{_breakable(row[0])}</th>']
            for place, cell in enumerate(row[1:], start=1):
                if grouped and place == 1:
                    cells.append(f'<th scope="row">{_breakable(cell)}</th>')
                    continue
                figure = place in right and (not cell or _FIGURE.match(cell) or cell == "wrong")
                marks = {"figure": figure, "wrong": cell == "wrong", "long": len(cell) > 2 * SHORT}
                named = " ".join(name for name, holds in marks.items() if holds)
                cells.append(f"<td{_class(named)}>{text_of(cell)}</td>")
            mark = "wrong" if row[:2] in wrong else "absent" if row[:2] in absent else ""
            lines.append(f"<tr{_class(mark)}>{''.join(cells)}</tr>")
        lines.append("</tbody>")
    return "\n".join([*lines, "</table>", "</div>"])


def _breakable(name: str) -> str:
    """Return a row's name; a long one may be broken after ``/`` and ``.``, a short one nowhere."""
    if len(name) <= SHORT:
        return f'<span class="short">{text_of(name)}</span>'
    return re.sub(r"([/.])(?=\w)", r"\1<wbr>", text_of(name))


def facts_html(facts: Mapping[str, object]) -> str:
    """Return names and values as a definition list."""
    pairs = (f"<div><dt>{text_of(name)}</dt><dd>{text_of(value)}</dd></div>" for name, value in facts.items())
    return "<dl>\n" + "\n".join(pairs) + "\n</dl>"


def list_html(items: Iterable[str], mark: str = "") -> str:
    """Return a list of items that are HTML already."""
    return "\n".join(['<ul class="notes">', *(f"<li{_class(mark)}>{item}</li>" for item in items), "</ul>"])


def badge(text: str, mark: str) -> str:
    """Return a word in a frame; ``mark`` is ``bad``, ``warn`` or ``good``."""
    return f'<span class="badge {mark}">{text_of(text)}</span>'


class Figures:
    """Renders figures and numbers the plots of a page, so that their identifiers are unique."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count(1)

    def html(self, figure: Figure) -> str:
        """Return the figure's title, legend, plots and caption."""
        lines = [f"<h4>{text_of(figure.title)}</h4>", "<figure>"]
        if figure.legend:
            items = (f"<li>{swatch(look)}{text_of(name)}</li>" for name, look in figure.legend.items())
            lines += ['<ul class="legend">', *items, "</ul>"]
        lines.append(f'<div class="panels{" small" if figure.small else ""}">')
        for panel in figure.panels:
            svg = numbered(panel.svg, next(self._numbers))
            svg = svg.replace("<svg", f'<svg role="img" aria-label="{text_of(panel.said)}"', 1)
            lines.append(f'<div class="panel"><p>{text_of(panel.title)}</p>\n{svg}</div>')
        lines += ["</div>", f"<figcaption>{text_of(figure.caption)}</figcaption>", "</figure>"]
        return "\n".join(lines)


def contents_html(sections: Sequence[Section]) -> str:
    """Return links to the sections and their parts."""
    lines = ["<ul>"]
    for target, name, parts in sections:
        inner = "".join(f'<li><a href="#{part}">{text_of(said)}</a></li>' for part, said in parts)
        below = f"<ul>{inner}</ul>" if inner else ""
        lines.append(f'<li><a href="#{target}">{text_of(name)}</a>{below}</li>')
    return "\n".join([*lines, "</ul>"])


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""

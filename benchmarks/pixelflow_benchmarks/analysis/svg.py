"""Figures as SVG embedded in a page: text in the page's colour and font, no external references.

Matplotlib draws without its global state. Its output is then adapted to a page: placeholder colours become CSS
variables, identifiers become unique, and metadata (date, creator, schemas) is removed.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixelflow_training.look import PALETTE, plot_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, WRONG, ABSENT = "#010203", "#040506", "#070809", "#0a0b0c"
"""Placeholders for colours that the page defines."""
_IN_PAGE = {INK: "currentColor", FAINT: "var(--rule)", WRONG: "var(--wrong)", ABSENT: "var(--muted)"}

GREYS = ("#858c96", "#b08f6a")
MARKERS = "osD^vP"

_TAG = re.compile(r"<[^<>]*>")


@dataclass(frozen=True, slots=True)
class Look:
    """How a variant is drawn: the same in all plots of a suite."""

    color: str
    marker: str


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw the plots in the context in one style, independent of the user's Matplotlib settings.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise ImportError("report needs matplotlib: the extra `report` (in a clone: make setup)") from error
    with style.context(["default", plot_style(INK, FAINT)]):
        yield


def looks(names: Sequence[str], measures: Sequence[str] = ()) -> dict[str, Look]:
    """Return a colour and a marker for each name; ``measures`` are the opponents, which are drawn in muted colours."""
    names = list(dict.fromkeys(names))
    found: dict[str, Look] = {}
    for i, name in enumerate(name for name in names if name in measures):
        found[name] = Look(GREYS[i % len(GREYS)], MARKERS[i % len(MARKERS)])
    for i, name in enumerate(name for name in names if name not in measures):
        found[name] = Look(PALETTE[i % len(PALETTE)], MARKERS[(i + 3 * (i // len(PALETTE))) % len(MARKERS)])
    return {name: found[name] for name in names}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure whose unit is a CSS pixel."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def to_svg(figure: Figure) -> str:
    """Return the figure's SVG element for embedding in a page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # Text between tags consists of names, in which nothing may be replaced.
    text = _TAG.sub(lambda tag: _for_page(tag[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _for_page(tag: str) -> str:
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r"font-family: [^;\"]*; ?", "", tag)
    tag = re.sub(r" transform=\"rotate\(-0 [^\"]*\)\"", "", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', tag)
    for color, in_page in _IN_PAGE.items():
        tag = tag.replace(color, in_page)
    return tag


def numbered(svg: str, number: int) -> str:
    """Make identifiers unique in the page by a number, and remove those that nothing refers to."""
    used = {name for tag in _TAG.findall(svg) for name in re.findall(r'(?:url\(|href=")#([\w-]+)', tag)}

    def rename(tag: re.Match[str]) -> str:
        kept = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", tag[0])
        return re.sub(r'( id="|url\(#|href="#)([\w-]+)', rf"\1p{number}-\2", kept)

    return _TAG.sub(rename, svg)


def swatch(look: Look) -> str:
    """Return a single marker as SVG, for a legend."""
    shapes = {
        "o": '<circle cx="7" cy="7" r="4.5"/>',
        "s": '<rect x="3" y="3" width="8" height="8"/>',
        "D": '<path d="M7 1.5 12.5 7 7 12.5 1.5 7z"/>',
        "^": '<path d="M7 2 12 11.5H2z"/>',
        "v": '<path d="M7 12 12 2.5H2z"/>',
        "P": '<path d="M5 2h4v3h3v4H9v3H5V9H2V5h3z"/>',
    }
    svg = f'<svg class="swatch" width="14" height="14" viewBox="0 0 14 14" aria-hidden="true" fill="{look.color}">'
    return f"{svg}{shapes[look.marker]}</svg>"

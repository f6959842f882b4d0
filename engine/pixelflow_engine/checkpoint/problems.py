"""Conversion of everything that can be wrong with a file to one exception type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pixelflow_engine.errors import CheckpointError

LONGEST_REASON = 400
LISTED_NAMES = 5


@contextmanager
def about(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Convert exceptions of these kinds to a CheckpointError that names ``path``; a CheckpointError passes through.

    Args:
        path: the file or folder that is read or written.
        kinds: exception types to convert. MemoryError and RecursionError are always converted, because a file can
            provoke both.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (MemoryError, RecursionError) as error:
        raise CheckpointError(f"{path}: needs too much memory or is nested too deeply") from error
    except kinds as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error


def listed(names: Iterable[str]) -> str:
    """The first few of many names, printable and shortened for a message."""
    ordered = [_printable(name if len(name) <= 100 else name[:100] + "...") for name in names]
    rest = len(ordered) - LISTED_NAMES
    return ", ".join(ordered[:LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _reason(error: Exception) -> str:
    """An exception's message on one line of bounded length, because it may quote the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = _printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def _printable(text: str) -> str:
    """Text of a file with its control characters and lone surrogates escaped: they could rewrite a terminal's lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

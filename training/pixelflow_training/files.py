"""File operations after which a power failure leaves either the old or the new state, never a mixture."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

PARTIAL, RETIRED = "partial", "old"  # suffixes of the hidden names that things have while they are written and deleted


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and synchronize their names to the disk; an existing folder is kept."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in absent or [folder]:
        sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: write a hidden file beside it, synchronize it, and rename it over the old one."""
    partial = path.with_name(f".{path.name}.{PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it is never seen half deleted: rename it to a hidden name, then delete its files."""
    retired = folder.with_name(f".{folder.name}.{RETIRED}")
    folder.rename(retired)
    sync(folder.parent)
    shutil.rmtree(retired)


def remove_leftovers(folder: Path, names: str) -> None:
    """Delete what writing and deleting left behind when it was cut short; other hidden files are not ours to delete.

    Args:
        folder: the folder to tidy.
        names: a regular expression for the names, in full, of what is written there.
    """
    pattern = re.compile(rf"\.(?:{names})\.(?:{PARTIAL}|{RETIRED})")
    for leftover in [path for path in folder.glob(".*") if pattern.fullmatch(path.name)]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

"""Files that a power cut leaves either as they were or as they were meant to be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file's contents, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, whose names are on the disk; one that is there stays as it is."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in absent or [folder]:
        sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole: into a hidden one beside it, brought to the disk, renamed over it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder that nobody may find half deleted: it is renamed to a hidden name before it loses a file."""
    retired = folder.with_name(f".{folder.name}.old")
    folder.rename(retired)
    sync(folder.parent)
    shutil.rmtree(retired)

"""Atomic replacement of a folder."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from pixelflow_engine.errors import CheckpointError
from pixelflow_engine.files import folder_for

from .problems import listed


def replace_folder(
    destination: Path, write: Callable[[Path], None], *, overwrite: bool, replaceable: Iterable[str]
) -> None:
    """Write a folder so that it never exists half written, neither for a reader nor after a power failure.

    The files are written into a hidden sibling folder and synced to the disk; one rename then moves the folder into
    place. An existing folder is first renamed aside, and removed at the end. Failures are undone in reverse order. Only
    a crash between the two renames leaves no destination; the old folder is then beside it, as ``.NAME.*.old``.

    Args:
        destination: an absolute path; its missing parents are made.
        write: writes the files into the empty folder that it is given.
        overwrite: whether an existing destination may be replaced.
        replaceable: the only file names that a folder to be replaced may contain; nothing else is ever deleted.

    Raises:
        CheckpointError: the destination may not be written, or the old folder could not be moved back after a failure;
            the message then says where it is.
        OSError: from the file system or ``write``; everything is as it was before.
    """
    check_destination(destination, overwrite=overwrite, replaceable=replaceable)
    token = secrets.token_hex(4)
    temporary = destination.with_name(f".{destination.name}.{token}.partial")
    retired = destination.with_name(f".{destination.name}.{token}.old")
    with folder_for(destination.parent) as made, ExitStack() as undo:
        temporary.mkdir()
        undo.callback(shutil.rmtree, temporary, ignore_errors=True)
        write(temporary)
        for file in sorted(temporary.iterdir()):
            _sync(file)
        _sync(temporary)
        if overwrite and destination.exists():
            destination.rename(retired)
            undo.callback(_put_back, retired, destination)
        temporary.rename(destination)
        undo.callback(destination.rename, temporary)
        for folder in (destination, *made):
            _sync(folder.parent)
        undo.pop_all()
    _remove(retired)


def check_destination(destination: Path, *, overwrite: bool, replaceable: Iterable[str]) -> None:
    """Refuse a destination that :func:`replace_folder` would refuse with the same arguments."""
    if not destination.exists():
        above = next(folder for folder in destination.parents if folder.exists())
        if not above.is_dir():
            raise CheckpointError(f"{destination}: {above} is a file, expected a folder")
        return
    if not overwrite:
        raise CheckpointError(f"{destination}: exists already, and overwrite (--overwrite) was not asked for")
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file, expected a folder to replace")
    known = set(replaceable)
    others = sorted(entry.name for entry in destination.iterdir() if entry.name not in known or entry.is_dir())
    if others:
        raise CheckpointError(f"{destination}: not replaced, because it also holds {listed(others)}")


def _put_back(retired: Path, destination: Path) -> None:
    try:
        retired.rename(destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: could not be replaced; the old checkpoint is now {retired}") from error


def _sync(path: Path) -> None:
    """Sync a file's contents, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(retired: Path) -> None:
    """Remove the replaced folder. The new one is already in place, so a failure is a warning, not an error."""
    try:
        if retired.exists():
            shutil.rmtree(retired)
    except OSError as error:
        warnings.warn(f"{retired}: the replaced checkpoint could not be removed: {error}", RuntimeWarning, stacklevel=4)

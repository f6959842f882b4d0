"""Files that appear whole or not at all, and the folders that they need."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def folder_for(folder: Path) -> Iterator[list[Path]]:
    """Make a folder and its missing parents; those that are still empty are removed again if the block fails.

    Yields:
        the folders that were missing, the innermost first.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield absent
    except BaseException:
        for path in absent:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of ``path``, made if missing, that gets its name at the end of the block.

    Readers see either the old file or the complete new one. If the block fails, nothing is left behind. A link keeps
    its place: what it leads to is replaced. A device or a pipe is written directly.

    Raises:
        OSError: on entering: there can be no file at ``path``; the error has its name.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as special:
            yield special
        return
    with folder_for(path.parent):
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            made = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)  # noqa: SIM115
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        with made as file:
            try:
                yield cast("BinaryIO", file)
                file.flush()
                os.fsync(file.fileno())
                mask = os.umask(0)
                os.umask(mask)
                os.fchmod(file.fileno(), 0o666 & ~mask)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        write(file)

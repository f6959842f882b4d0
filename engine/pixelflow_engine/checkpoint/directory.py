"""Where the central directory of a zip archive is.

Two readers look at a ``.pt`` file: Python's :mod:`zipfile`, which checks it, and torch's own, which loads it. torch
takes the directory's offset from the end record. ``zipfile`` takes the bytes before the end record instead, and
corrects offsets by the difference, to read archives that follow other data. In a file of two archives they can read
different ones. Here the offset must be where the directory is, so that both read the same.

Source: .ZIP File Format Specification 6.3.10 (APPNOTE.TXT), sections 4.3.14 to 4.3.16.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from pixelflow_engine.errors import CheckpointError

# Signature, four numbers of disks and entries, size and offset of the directory, length of the comment.
END = struct.Struct("<4s4H2LH")
# Signature, disk, offset of the 64-bit end record, number of disks.
LOCATOR = struct.Struct("<4sLQL")
# Signature, size of the rest, two versions, two disks, two numbers of entries, size and offset of the directory.
END64 = struct.Struct("<4sQ2H2L4Q")


def check_directory(file: BinaryIO, entries: int, path: object) -> None:
    """Refuse an archive whose end records say something else than where its central directory is.

    Args:
        file: the archive, open for reading.
        entries: number of entries that ``zipfile`` found.
        path: of the file, for messages.

    Raises:
        CheckpointError: the file does not end with an end record without a comment; an offset in an end record is not
            that of what it refers to; or the number of entries is another.
    """
    end = file.seek(0, 2) - END.size
    signature, _, _, _, total, size, offset, comment = _read(file, END, end)
    if signature != b"PK\x05\x06" or comment != 0:
        raise CheckpointError(f"{path}: does not end with the end record of a zip archive, or has a comment")
    locator = end - LOCATOR.size
    signature, _, start, _ = _read(file, LOCATOR, locator)
    if signature == b"PK\x06\x07":
        end = locator - END64.size
        signature, _, _, _, _, _, _, total, size, offset = _read(file, END64, end)
        if start != end or signature != b"PK\x06\x06":
            raise CheckpointError(f"{path}: its 64-bit end record is not at {start}, where the file says")
    if offset + size != end:
        raise CheckpointError(
            f"{path}: its directory of {size} bytes is not at {offset}, where the file says: not one whole archive"
        )
    if total != entries:
        raise CheckpointError(f"{path}: its directory has {entries} entries, the file says {total}")


def _read(file: BinaryIO, record: struct.Struct, start: int) -> tuple[Any, ...]:
    """The fields of a record, all zero bytes if it would begin before the file."""
    if start < 0:
        return record.unpack(bytes(record.size))
    file.seek(start)
    return record.unpack(file.read(record.size))

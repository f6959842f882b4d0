"""What files a run is trained on, in few words for its checkpoints: so that others are noticed where it goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from .source import PASSING, ImageSource

Listing = dict[str, str]
"""Each part of the data, a class folder or a tar, by name: how many images it has, their bytes, and a digest of the
images' names and sizes in their order."""


def listing_of(source: ImageSource) -> Listing:
    """The listing of a source: its own, or for one that has none what can be told of its labels."""
    own = getattr(source, "listing", None)
    if own is not None:
        found: Listing = own()
        return found
    labels = source.labels.contiguous()
    return {"labels": f"{len(labels)} images, {hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16]}"}


def describe(images: Iterable[tuple[str, int]]) -> str:
    """One part of a listing.

    Args:
        images: name and size in bytes of each, in their order; what is said of an image beside its size belongs to its
            name.
    """
    sha, count, total = hashlib.sha256(), 0, 0
    for name, size in images:
        sha.update(os.fsencode(name) + f"\0{size}\n".encode())
        count, total = count + 1, total + size
    return f"{count} images, {total} bytes, {sha.hexdigest()[:16]}"


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 if it cannot be told, of an image that will be skipped.

    Raises:
        OSError: it may be told another time.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno in PASSING:
            raise
        return 0


def differences(now: Listing, before: Listing) -> list[str]:
    """What was added, changed and removed, a line each."""
    lines = []
    for name in sorted(now.keys() | before.keys()):
        if name not in before:
            lines.append(f"{name} is new")
        elif name not in now:
            lines.append(f"{name} is missing")
        elif now[name] != before[name]:
            lines.append(f"{name}: got {now[name]}, the checkpoint has {before[name]}")
    return lines

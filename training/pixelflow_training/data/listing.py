"""A compact listing of the files a run is trained on, stored in checkpoints to detect changes when the run resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .source import PASSING, ImageSource

Listing = dict[str, str]
"""The parts of the data, class folders or tars, by name.

A value states the number of images, their total size in bytes, and a digest of the images' names and sizes in order.
Images that are in no files have one part, with a digest of their labels.
"""


def listing_of(source: ImageSource) -> Listing:
    """Return the listing of a source: its own if it has one, else a digest of its labels."""
    own = getattr(source, "listing", None)
    if own is not None:
        found: Listing = own()
        return found
    return {"labels": describe_labels(source.labels)}


def describe_labels(labels: Tensor) -> str:
    """Describe images by their labels ``[N]``."""
    return f"{len(labels)} images, {hashlib.sha256(labels.contiguous().numpy().tobytes()).hexdigest()[:16]}"


def describe(images: Iterable[tuple[str, int]]) -> str:
    """Describe one part of a listing.

    Args:
        images: name and size in bytes of each image, in order. Anything else that identifies an image must be part of
            its name.
    """
    sha, count, total = hashlib.sha256(), 0, 0
    for name, size in images:
        sha.update(os.fsencode(name) + f"\0{size}\n".encode())
        count, total = count + 1, total + size
    return f"{count} images, {total} bytes, {sha.hexdigest()[:16]}"


def size_of(path: Path) -> int:
    """Return a file's size in bytes, or 0 if it cannot be determined, for an image that will be skipped.

    Raises:
        OSError: a transient failure; the size may be available another time.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        if error.errno in PASSING:
            raise
        return 0


def differences(now: Listing, before: Listing) -> list[str]:
    """List the parts that were added, changed or removed, one line each."""
    lines = []
    for name in sorted(now.keys() | before.keys()):
        if name not in before:
            lines.append(f"{name} is new")
        elif name not in now:
            lines.append(f"{name} is missing")
        elif now[name] != before[name]:
            lines.append(f"{name}: got {now[name]}, the checkpoint has {before[name]}")
    return lines

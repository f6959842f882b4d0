"""Images in a tree with one folder per class, like ImageNet's: ``root/class/.../image.jpg``."""

from __future__ import annotations

import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from pixelflow_engine.errors import ConfigError

from .decode import OTHER_SUFFIXES, SUFFIXES, decode
from .listing import Listing, describe, size_of
from .names import Names
from .source import UnreadableImageError, unreadable


class FolderSource:
    """The images below a folder; the class is the index of the top-level folder in the sorted order of names.

    Images are sorted by the bytes of their paths, independently of the file system's order. Links are followed. Files
    and folders whose names begin with a dot are ignored, as are files without the suffix of an image; a warning counts
    those whose suffix is that of an image of another format.

    Args:
        root: the folder.
        num_classes: of the model; 0 for a model without classes, which accepts any number of folders.
        channels, max_pixels: see :func:`~.decode.decode`.

    Raises:
        ConfigError: the number of folders differs from that of classes, a folder has no image, or a link leads back to
            a folder that contains it.
        OSError: a folder cannot be read.
    """

    def __init__(self, root: Path, num_classes: int, channels: int, max_pixels: int) -> None:
        self.root = root
        self.channels = channels
        self.max_pixels = max_pixels
        if not root.is_dir():
            raise ConfigError(f"data.path: {root} is not a folder")
        classes = sorted((e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != "."), key=os.fsencode)
        if not classes or len(classes) != num_classes > 0:
            expected = f"model.num_classes, {num_classes}" if num_classes else "one or more"
            raise ConfigError(f"data.path: {root} has {_listed(classes, 'class folders')}, expected {expected}")
        others: dict[str, list[str]] = {name: [] for name in classes}
        members = [_images_below(root, name, others[name]) for name in classes]
        left_out = _of_other_formats(path for name in classes for path in others[name])
        if empty := [name for name, images in zip(classes, members, strict=True) if not images]:
            why = f"; of formats that are not read there are {left_out}" if left_out else ""
            raise ConfigError(f"data.path: {root} has {_listed(empty, 'class folders')} without images{why}")
        if left_out:
            warnings.warn(f"data.path: {root} has images of formats that are not read: {left_out}", stacklevel=2)
        counts = torch.tensor([len(images) for images in members])
        self.labels: Tensor = torch.arange(len(classes)).repeat_interleave(counts)
        self._names = Names(name for images in members for name in images)
        self.classes: list[str] = classes

    def name(self, sample: int) -> str:
        """Path relative to the root."""
        return self._names[sample]

    def load(self, sample: int) -> Tensor:
        """See :class:`~.source.ImageSource`."""
        path = self.root / self._names[sample]
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for a writer
                raise UnreadableImageError("not a regular file")
            with path.open("rb") as file:
                return decode(file, self.channels, self.max_pixels)
        except OSError as error:
            raise unreadable(error, path) from error

    def listing(self) -> Listing:
        """See :func:`~.listing.listing_of`; queries the size of every file."""
        ends = torch.bincount(self.labels).cumsum(0).tolist()
        return {
            name: describe((image, size_of(self.root / image)) for image in map(self.name, range(begin, end)))
            for name, begin, end in zip(self.classes, [0, *ends], ends, strict=False)
        }


def _images_below(root: Path, name: str, others: list[str]) -> list[str]:
    """Return the paths of a class's images relative to the root, sorted; images of other formats go to ``others``."""
    found = []
    ways = {root: {_identity(root)}}  # folder -> identities of the folder and of all folders above it
    for folder, folders, files in os.walk(root / name, onerror=_raise, followlinks=True):
        path = Path(folder)
        itself, above = _identity(path), ways[path.parent]
        if itself in above:
            raise ConfigError(f"data.path: {folder} lies in itself: a link on the way leads back")
        ways[path] = {*above, itself}
        folders[:] = [inner for inner in folders if inner[0] != "."]
        below = os.path.relpath(folder, root)
        shown = [file for file in files if file[0] != "."]
        found += [f"{below}/{file}" for file in shown if file.lower().endswith(SUFFIXES)]
        others += [file for file in shown if file.lower().endswith(OTHER_SUFFIXES)]
    return sorted(found, key=os.fsencode)


def _of_other_formats(files: Iterable[str]) -> str:
    """Count files by their suffix: ``2 .gif, 1 .tiff``."""
    counts = Counter(Path(file).suffix.lower() for file in files)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode, which are the same for every path that leads to the folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> NoReturn:
    raise error


def _listed(names: list[str], what: str) -> str:
    """Format a count and up to five names: ``3 class folders (cat, dog, owl)``."""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")

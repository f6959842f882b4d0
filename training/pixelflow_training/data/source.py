"""Interfaces between training and its images: sources of images by number, and the images of a plan."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pixelflow_training.config import DataConfig
from pixelflow_training.plan import Plan


class UnreadableImageError(Exception):
    """An image cannot be read or is not an image; the message is the reason, which is the same on every attempt."""


PASSING = frozenset(
    {
        errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENODEV,
        errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    }
)  # fmt: skip
"""Transient errors of a disk, a server or this process, not of the file: it may be readable another time."""


def unreadable(error: OSError, path: Path) -> Exception:
    """Return the exception to raise where a file cannot be read.

    A replaced image must be replaced on every attempt. A transient error is therefore raised as an OSError, which ends
    the run, and not as an :class:`UnreadableImageError`.
    """
    if error.errno in PASSING:
        return OSError(error.errno, error.strerror, str(path))
    return UnreadableImageError(error.strerror or str(error))


class ImageSource(Protocol):
    """Labelled images of any size, by number. Any object that implements it can be trained on: ``train(source=...)``.

    With ``data.workers`` above 0 it is pickled, once for each worker. It may also have

    - a method ``listing()``, which describes the data part by part in a ``dict[str, str]``: a resumed run compares that
      with the checkpoint's, and without it the labels alone;
    - ``classes``, the names of the classes in the order of the labels, which a run keeps in ``classes.json``.

    Attributes:
        labels: ``[N]`` int64, from 0 to ``model.num_classes - 1``, one for each of the N images.
    """

    @property
    def labels(self) -> Tensor:
        """Labels, ``[N]`` int64."""

    def name(self, sample: int) -> str:
        """Return a name by which a user can find the image, such as a file name."""

    def load(self, sample: int) -> Tensor:
        """Return an image ``[c, H, W]`` uint8 with the model's channels, the same on every call.

        Raises:
            UnreadableImageError: the image is skipped; any other error stops the run.
        """


class SkippedImage(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class Taken:
    """The images of a plan, in its order.

    Attributes:
        images: ``[n, c, R, R]`` uint8.
        labels: ``[n]`` int64.
        skipped: images that could not be read and were replaced by others.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[SkippedImage, ...] = ()

    def pin_memory(self) -> Taken:
        """Return a copy in page-locked memory."""
        return Taken(self.images.pin_memory(), self.labels.pin_memory(), self.skipped)


class TrainingImages(Protocol):
    """Images of the model's size, numbered as in a plan's ``sample``."""

    def __len__(self) -> int: ...

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the classes in the order of the labels, if the source knows them."""

    def listing(self) -> dict[str, str]:
        """Return the listing of the data, see :mod:`.listing`."""

    def name(self, sample: int) -> str:
        """Return a name by which a user can find a sample, given its number in plans."""

    def take(self, plan: Plan) -> Taken:
        """Return the images of a plan."""


def split(count: int, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Split sample numbers into those to train on and those held out, each in an order drawn by ``split_seed``.

    Raises:
        ValueError: ``held_out`` leaves one of the parts empty.
    """
    if not 0 < config.held_out < count:
        raise ValueError(f"data.held_out: got {config.held_out}, expected 1 to {count - 1}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    return order[config.held_out :], order[: config.held_out]

"""What training asks of images: a source of them by number, and those of a plan, ready for the pack."""

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
    """An image cannot be read, or is not one; the message is the reason, and the same every time."""


PASSING = frozenset(
    {
        errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENODEV,
        errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNABORTED,
        errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    }
)  # fmt: skip
"""Errors of a disk, a server or this process, not of a file: it may be read another time."""


def unreadable(error: OSError, path: Path) -> Exception:
    """What to raise where a file cannot be read.

    An image that another stands in for is to be the same one every time, so an error that passes ends the run instead.
    """
    if error.errno in PASSING:
        return OSError(error.errno, error.strerror, str(path))
    return UnreadableImageError(error.strerror or str(error))


class ImageSource(Protocol):
    """Labelled images by number, of any size. Whoever implements it can be trained on: ``train(source=...)``.

    With ``data.workers`` above 0 it is pickled, once for each worker. If it has a method ``listing()``, which says in a
    ``dict[str, str]`` what there is, part by part, a run that goes on is held against it; else against the labels.

    Attributes:
        labels: ``[N]`` int64, from 0 to ``model.num_classes - 1``; their number is that of the images.
    """

    @property
    def labels(self) -> Tensor:
        """See above."""

    def name(self, sample: int) -> str:
        """What a user would look for: a file's name, say."""

    def load(self, sample: int) -> Tensor:
        """An image ``[c, H, W]`` uint8 with the model's channels, the same at every call.

        Raises:
            UnreadableImageError: it is skipped; any other error stops the run.
        """


class SkippedImage(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False, slots=True)
class Taken:
    """The images of a plan, in its order.

    Attributes:
        images: ``[n, c, R, R]`` uint8.
        labels: ``[n]`` int64.
        skipped: those that could not be read; others stand in for them.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[SkippedImage, ...] = ()

    def pin_memory(self) -> Taken:
        """The same in memory that a GPU can read by itself."""
        return Taken(self.images.pin_memory(), self.labels.pin_memory(), self.skipped)


class TrainingImages(Protocol):
    """Images of the model's size, numbered as plans number samples."""

    def __len__(self) -> int: ...

    def listing(self) -> dict[str, str] | None:
        """What files there are, as in :mod:`.listing`; None for images that a version of this package makes."""

    def name(self, sample: int) -> str:
        """What a user would look for, of a sample's number in plans."""

    def take(self, plan: Plan) -> Taken:
        """The images of a plan."""


@dataclass(frozen=True, eq=False, slots=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: ``[N, c, R, R]`` uint8.
        labels: ``[N]`` int64.
        names: where they come from; by default their numbers.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return self.labels.shape[0]

    def listing(self) -> None:
        """There are no files."""

    def name(self, sample: int) -> str:
        """As it was given."""
        return self.names[sample] if self.names else str(sample)

    def take(self, plan: Plan) -> Taken:
        """The images of a plan."""
        return Taken(self.images[plan.sample], self.labels[plan.sample])


def split(count: int, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Numbers of the images to train on and of those held out, each in an order drawn by ``split_seed``.

    Raises:
        ValueError: ``held_out`` leaves nothing on one side.
    """
    if not 0 < config.held_out < count:
        raise ValueError(f"data.held_out: got {config.held_out}, expected 1 to {count - 1}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.split_seed))
    return order[config.held_out :], order[: config.held_out]

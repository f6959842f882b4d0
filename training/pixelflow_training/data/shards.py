"""Images in tar files, as WebDataset writes them: the members ``key.jpg`` and ``key.cls`` are one sample."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pixelflow_engine.errors import ConfigError

from .decode import SUFFIXES, decode
from .listing import Listing, describe
from .names import Names
from .source import unreadable

LABELS = (".cls", ".json")
LABEL_BYTES = 1 << 20  # a label that claims to be longer is none


class Member(NamedTuple):
    """A file in a tar: its name there, where its bytes begin in the tar, and their number."""

    name: str
    offset: int
    size: int


class ShardSource:
    """The images of tar files. Each file is listed once; then any image is one read.

    Members with the same path up to the first dot of the file name are a sample: one image, and its class as a number
    in ``.cls`` or under ``label`` in ``.json``. Samples are in the order of the tars' names and of their first members.

    Args:
        path: a tar, or a folder of them (``*.tar``); not compressed, as a compressed one must be read from its start.
        num_classes: of the model; 0 for a model without classes, which needs no labels.
        channels, max_pixels: as in :func:`~.decode.decode`.

    Raises:
        ConfigError: naming the tar and the sample that is not whole, twice there, or of no such class.
        OSError: a tar cannot be read.
    """

    def __init__(self, path: Path, num_classes: int, channels: int, max_pixels: int) -> None:
        self.channels = channels
        self.max_pixels = max_pixels
        self._shards = [path] if path.is_file() else sorted(path.glob("*.tar"), key=os.fsencode)
        if not self._shards:
            raise ConfigError(f"data.path: {path} is neither a tar nor a folder that has *.tar")
        names: list[str] = []
        labels: list[int] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self._shards):
            with shard.open("rb") as file:
                for image, label in _samples(shard, list(_members(shard, file.fileno()))):
                    where = f"data.path: {shard}: {image.name}"
                    labels.append(_label(file.fileno(), label, num_classes, where) if num_classes else 0)
                    names.append(image.name)
                    places.append((number, image.offset, image.size))
        if not names:
            raise ConfigError(f"data.path: {path} has no images")
        self.labels: Tensor = torch.tensor(labels)
        self._names = Names(names)
        self._places = torch.tensor(places)

    def name(self, sample: int) -> str:
        """The tar's file name and the member's."""
        return f"{self._shards[int(self._places[sample, 0])].name}: {self._names[sample]}"

    def load(self, sample: int) -> Tensor:
        """See :class:`~.source.ImageSource`."""
        number, offset, size = self._places[sample].tolist()
        try:
            with self._shards[number].open("rb") as file:
                content = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise unreadable(error, self._shards[number]) from error
        return decode(io.BytesIO(content), self.channels, self.max_pixels)

    def listing(self) -> Listing:
        """See :func:`~.listing.listing_of`. An image's class counts as well: the tar says it, not the order."""
        numbers = self._places[:, 0].contiguous()
        found = {}
        for number, shard in enumerate(self._shards):
            begin, end = torch.searchsorted(numbers, torch.tensor([number, number + 1])).tolist()
            images = ((f"{self._names[i]}\0{self.labels[i]}", int(self._places[i, 2])) for i in range(begin, end))
            found[shard.name] = describe(images)
        return found


def _members(shard: Path, descriptor: int) -> Iterator[Member]:
    """The plain files of a tar that is whole."""
    try:
        with tarfile.open(shard, "r:") as archive:
            while member := archive.next():
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
                archive.members.clear()  # type: ignore[attr-defined] # a list of all that it has seen
            end = archive.offset
    except tarfile.TarError as error:
        raise ConfigError(f"data.path: {shard}: not a tar without compression, or not all of one: {error}") from error
    # What comes next is the end, unless a header is damaged, at which tarfile stops as well.
    if os.pread(descriptor, tarfile.BLOCKSIZE, end).strip(b"\0"):
        raise ConfigError(f"data.path: {shard}: damaged at byte {end}")


def _samples(shard: Path, members: list[Member]) -> Iterator[tuple[Member, Member | None]]:
    """Image and label of each sample."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        kind = f".{suffix.lower()}"
        if not stem or not kind.endswith((*SUFFIXES, *LABELS)):
            continue
        sample = samples.setdefault(f"{folder}{slash}{stem}", {})
        if kind in sample:
            raise ConfigError(f"data.path: {shard}: {member.name} is there twice")
        sample[kind] = member
    for key, sample in samples.items():
        images = [member for kind, member in sample.items() if kind.endswith(SUFFIXES)]
        if len(images) != 1:
            raise ConfigError(f"data.path: {shard}: {key} has {len(images)} images, expected one")
        yield images[0], sample.get(".cls", sample.get(".json"))


def _label(descriptor: int, member: Member | None, num_classes: int, where: str) -> int:
    """The class that a member of a tar holds."""
    expected = f"expected a class from 0 to {num_classes - 1}"
    if member is None:
        raise ConfigError(f"{where} has neither a .cls nor a .json, {expected}")
    if member.size > LABEL_BYTES:
        raise ConfigError(f"{where}: {member.name} has {member.size} bytes, {expected}")
    text = os.pread(descriptor, member.size, member.offset)
    try:
        label = int(text) if member.name.lower().endswith(".cls") else json.loads(text)["label"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {member.name} has no class ({type(error).__name__}: {error}), {expected}"
        ) from error
    if type(label) is not int or not 0 <= label < num_classes:
        raise ConfigError(f"{where}: got {label!r} in {member.name}, {expected}")
    return label

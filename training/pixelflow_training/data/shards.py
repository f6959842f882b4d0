"""Images in tar files, as WebDataset writes them: the members ``key.jpg`` and ``key.cls`` form one sample."""

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
LABEL_BYTES = 1 << 20  # a longer file is not taken for a label
CHUNK = 1 << 20


class Member(NamedTuple):
    """A file in a tar: its name, the offset of its contents in the tar, and their size in bytes."""

    name: str
    offset: int
    size: int


class ShardSource:
    """The images of tar files. Each tar is scanned once; after that, loading any image is a single read.

    Members with the same path up to the first dot of the file name form a sample: one image, and its class as a number
    in ``.cls`` or under ``label`` in ``.json``. Samples are sorted by tar name and then by the position of their first
    member.

    Args:
        path: a tar, or a folder of them (``*.tar``). They must be uncompressed, as a compressed tar can only be read
            from its start.
        num_classes: of the model; 0 for a model without classes, which needs no labels.
        channels, max_pixels: see :func:`~.decode.decode`.

    Raises:
        ConfigError: there are no tars or no images, a tar is damaged, or a sample is incomplete, has a member twice or
            has an invalid class; the message names the tar and the sample.
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
        """File name of the tar and name of the member in it."""
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
        """See :func:`~.listing.listing_of`.

        An image's class is included: it is stored in the tar, not implied by the order.
        """
        numbers = self._places[:, 0].contiguous()
        found = {}
        for number, shard in enumerate(self._shards):
            begin, end = torch.searchsorted(numbers, torch.tensor([number, number + 1])).tolist()
            images = ((f"{self._names[i]}\0{self.labels[i]}", int(self._places[i, 2])) for i in range(begin, end))
            found[shard.name] = describe(images)
        return found


def _members(shard: Path, descriptor: int) -> Iterator[Member]:
    """Yield the regular files of a tar.

    Raises:
        ConfigError: the tar is compressed, truncated or damaged.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            while member := archive.next():
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
                archive.members.clear()  # type: ignore[attr-defined] # otherwise tarfile keeps every member
            end = archive.offset
    except tarfile.TarError as error:
        raise ConfigError(f"data.path: {shard}: not a tar without compression, or not all of one: {error}") from error
    # tarfile also stops without an error at a damaged header, and at the end of the first of two tars that were joined.
    while block := os.pread(descriptor, CHUNK, end):
        if rest := block.lstrip(b"\0"):
            raise ConfigError(
                f"data.path: {shard}: damaged at byte {end + len(block) - len(rest)}, or several tars in one file: "
                "expected zeros to its end"
            )
        end += len(block)


def _samples(shard: Path, members: list[Member]) -> Iterator[tuple[Member, Member | None]]:
    """Yield the image and the label, if any, of each sample."""
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
    """Read the class from a label member of a tar."""
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

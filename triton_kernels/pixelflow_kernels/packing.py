"""How images of any sizes lie along one token axis.

A pack is a tensor ``[T, ...]`` that holds the tokens of ``n`` images one after the other, each image's tokens in
row-major order. Everything that an operation must know about who a token belongs to is in its :class:`PackedLayout`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring images with one and the same token grid, which can be viewed as a batch.

    Attributes:
        images: the images, as a slice of the pack's images.
        tokens: their tokens, as a slice of the token axis.
        count: how many images.
        grid: rows and columns of tokens of each.
    """

    images: slice
    tokens: slice
    count: int
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class PackedLayout:
    """Which image and which place each of ``T`` packed tokens belongs to.

    Attributes:
        grids: rows and columns of tokens of each of the ``n`` images.
        cu_seqlens: ``[n + 1]`` int32, where each image starts; the last entry is ``T``.
        cu_seqlens_and_none: ``[n + 2]`` int32, the same with an image of no tokens after the last: what attends to keys
            that belong to nobody.
        image_index: ``[T]`` int32, the image of each token.
        row, column: ``[T]`` int32, its place in the image.
        runs: neighbouring images of one grid, in order.
        max_seqlen: tokens of the largest image; 0 in an empty pack.
        multiple_of: the largest number that divides every image's number of tokens; 1 in an empty pack.
        max_position: rows or columns of the largest grid; 0 in an empty pack.

    Tensors and the three numbers are all that the fused operations read, so a compiled graph serves any layout.
    """

    grids: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor
    image_index: Tensor
    row: Tensor
    column: Tensor
    runs: tuple[Run, ...]
    cu_seqlens_and_none: Tensor = field(init=False)
    max_seqlen: int = field(init=False)
    multiple_of: int = field(init=False)
    max_position: int = field(init=False)

    @classmethod
    def from_grids(cls, grids: Iterable[Sequence[int]], device: torch.device | str | None = None) -> PackedLayout:
        """Lay out images in the given order.

        Args:
            grids: ``(rows, columns)`` of tokens of each image, both positive; an empty pack is allowed.
            device: where the index tensors live.

        Raises:
            ValueError: a grid is not two positive integers.
        """
        sizes: list[tuple[int, int]] = []
        for i, grid in enumerate(grids):
            if len(grid) != 2 or not all(isinstance(v, int) and v > 0 for v in grid):
                raise ValueError(f"grids[{i}]: got {tuple(grid)!r}, expected two positive integers (rows, columns)")
            sizes.append((grid[0], grid[1]))
        runs, image, token = [], 0, 0
        images, rows, columns = [], [], []
        host = partial(torch.arange, dtype=torch.int32, device="cpu")
        for (height, width), group in groupby(sizes):
            count = len(list(group))
            length = height * width
            runs.append(Run(slice(image, image + count), slice(token, token + count * length), count, (height, width)))
            images.append(host(image, image + count).repeat_interleave(length))
            rows.append(host(height).repeat_interleave(width).repeat(count))
            columns.append(host(width).repeat(height * count))
            image, token = image + count, token + count * length
        lengths = torch.tensor([0] + [h * w for h, w in sizes], dtype=torch.int64, device="cpu")
        empty = [host(0)]
        return cls(
            grids=tuple(sizes),
            cu_seqlens=lengths.cumsum(0).to(torch.int32).to(device),
            image_index=torch.cat(images or empty).to(device),
            row=torch.cat(rows or empty).to(device),
            column=torch.cat(columns or empty).to(device),
            runs=tuple(runs),
        )

    def __post_init__(self) -> None:
        lengths = [rows * columns for rows, columns in self.grids]
        object.__setattr__(self, "cu_seqlens_and_none", torch.cat([self.cu_seqlens, self.cu_seqlens[-1:]]))
        object.__setattr__(self, "max_seqlen", max([0, *lengths]))
        object.__setattr__(self, "multiple_of", math.gcd(*lengths) or 1)
        object.__setattr__(self, "max_position", max([0, *(max(grid) for grid in self.grids)]))

    @property
    def num_images(self) -> int:
        """``n``."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return self.image_index.shape[0]

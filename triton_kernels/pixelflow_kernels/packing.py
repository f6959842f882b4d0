"""Layout of images of any sizes along one token axis.

A pack is a tensor ``[T, ...]`` that holds the tokens of ``n`` images one after the other, each image's tokens in
row-major order. Its :class:`PackedLayout` tells operations which image each token belongs to and where it lies in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from .transfers import uploaded


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive images with the same token grid, which can be viewed as a batch.

    Attributes:
        images: the images, as a slice of the pack's images.
        tokens: their tokens, as a slice of the token axis.
        count: number of images.
        grid: rows and columns of tokens of each image.
    """

    images: slice
    tokens: slice
    count: int
    grid: tuple[int, int]


@dataclass(frozen=True, eq=False, slots=True)
class PackedLayout:
    """The image, and the position in that image, of each of ``T`` packed tokens.

    Attributes:
        grids: rows and columns of tokens of each of the ``n`` images.
        cu_seqlens: ``[n + 1]`` int32, the index of each image's first token; the last entry is ``T``.
        cu_seqlens_and_none: ``[n + 2]`` int32, the same with an additional image of zero tokens at the end. It pairs
            with keys that belong to no image, such as padding.
        image_index: ``[T]`` int32, the image of each token.
        row, column: ``[T]`` int32, the position of each token in its image.
        runs: maximal runs of consecutive images with the same grid, in order.
        max_seqlen: number of tokens of the largest image; 0 in an empty pack.
        multiple_of: greatest common divisor of the images' token counts; 1 in an empty pack.
        max_position: largest number of rows or columns of any grid; 0 in an empty pack.

    Of these, the fused operations of the model read only the tensors and the last three numbers, so a compiled graph
    serves any layout. (``cascade.training_pairs`` also validates ``grids``.)
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
            device: device of the index tensors.

        Raises:
            ValueError: a grid is not a pair of positive integers.
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
        place = torch.device("cpu" if device is None else device)
        return cls(
            grids=tuple(sizes),
            cu_seqlens=uploaded(lengths.cumsum(0).to(torch.int32), place),
            image_index=uploaded(torch.cat(images or empty), place),
            row=uploaded(torch.cat(rows or empty), place),
            column=uploaded(torch.cat(columns or empty), place),
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
        """Number of images ``n``."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens ``T``."""
        return self.image_index.shape[0]

"""Random draws as pure functions of (seed, purpose, position), so that a place in training is an integer.

Philox4x32-10 turns a key and a counter into four random words. The key is the seed, the counter is (low word of the
position, its high word, purpose, block), so a draw depends on nothing that was drawn before or beside it. Where
PyTorch's own generator is needed, for weights and permutations of a data set, its seed is such a draw.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from pixelflow_kernels.philox import philox4x32

_MASK32 = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent.

    The numbers begin at 16, away from the purposes of noise (``pixelflow_kernels.philox``), whose seed may be the same.
    """

    WEIGHTS = 16
    ORDER = 17
    STAGE = 18
    TIME = 19
    LABEL_DROP = 20
    FLIP = 21
    AFFINE = 22
    NOISE = 23
    HELD_OUT = 24
    CROP = 25


def words(seed: int, purpose: Purpose, positions: Tensor, count: int) -> Tensor:
    """Random 32-bit words: ``[n, count]`` int64, 0 to 2^32 - 1.

    The first words of a position are the same however many are asked for.

    Args:
        seed: 0 to 2^64 - 1.
        purpose: what they are for.
        positions: ``[n]`` int64, 0 or more.
        count: words of each position.

    Raises:
        ValueError: the seed is out of range.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
    low, high = (positions & _MASK32)[:, None], (positions >> 32)[:, None]
    block = torch.arange(-(-count // 4))
    key = torch.tensor(seed & _MASK32), torch.tensor(seed >> 32)
    drawn = philox4x32((low, high, torch.tensor(int(purpose)), block), key)
    return torch.stack(drawn, dim=-1).flatten(1)[:, :count]


def uniforms(seed: int, purpose: Purpose, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers ``[n, count]`` float64 from 0 to below 1, multiples of 2^-53; arguments as in :func:`words`."""
    high, low = words(seed, purpose, positions, 2 * count).unflatten(1, (count, 2)).unbind(-1)
    return (high << 21 | low >> 11).double() * 2.0**-53


def integers(seed: int, purpose: Purpose, positions: Tensor, bound: int) -> Tensor:
    """Whole numbers ``[n]`` int64 from 0 to ``bound - 1``, ``bound`` below 2^31; the others as in :func:`words`.

    ``floor(bound w / 2^64)`` of a 64-bit number w, exactly: no number is likelier than another by more than 2^-33 of
    its probability.
    """
    if not 1 <= bound < 2**31:
        raise ValueError(f"bound: got {bound}, expected 1 to 2^31 - 1")
    high, low = words(seed, purpose, positions, 2).unbind(-1)
    return (high * bound + (low * bound >> 32)) >> 32


def seeds(seed: int, purpose: Purpose, positions: Tensor) -> Tensor:
    """Seeds ``[n]`` int64 of 64 random bits for draws of their own; arguments as in :func:`words`."""
    low, high = words(seed, purpose, positions, 2).unbind(-1)
    return high << 32 | low


def new_seed(seed: int, purpose: Purpose, position: int = 0) -> int:
    """A seed from 0 to 2^64 - 1 for draws that are apart from those of ``seed``."""
    return int(seeds(seed, purpose, torch.tensor([position]))[0]) % 2**64


def sample_ids(seed: int, positions: Tensor, dataset_size: int) -> Tensor:
    """Which sample is seen at each position, ``[n]`` int64: every epoch is a permutation of the data set.

    Args:
        seed: 0 to 2^64 - 1.
        positions: ``[n]`` int64, samples consumed before.
        dataset_size: number of samples.
    """
    ids = torch.empty_like(positions)
    epochs = positions // dataset_size
    for epoch in epochs.unique().tolist():
        now = epochs == epoch
        ids[now] = _epoch_order(seed, epoch, dataset_size)[positions[now] % dataset_size]
    return ids


@lru_cache(maxsize=2)  # a step that ends an epoch begins the next
def _epoch_order(seed: int, epoch: int, dataset_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(new_seed(seed, Purpose.ORDER, epoch))
    return torch.randperm(dataset_size, generator=generator)


def balanced_stages(seed: int, step: int, batch_size: int, num_stages: int) -> Tensor:
    """The stage of each image of a step in random order: ``[batch_size]`` int64, counts differing by at most one.

    The step has as many images of each stage as its positions have remainders modulo ``num_stages``. So the stages that
    have one more take turns, and the counts of all steps so far differ by at most one, too.
    """
    first = step * batch_size
    stages = torch.arange(first, first + batch_size) % num_stages
    order = uniforms(seed, Purpose.STAGE, torch.tensor([step]), batch_size)[0].argsort(stable=True)
    return stages[order]

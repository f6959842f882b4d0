"""Random draws as pure functions of (seed, purpose, position), so that an integer determines a position in training.

Philox4x32-10 maps a key and a counter to four random words. The key is the seed, the counter is (low word of the
position, its high word, purpose, block), so a draw does not depend on any other draw. Where PyTorch's own generator is
needed, for weights and permutations of a data set, its seed is such a draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD, _MASK32 = np.uint64(32), np.uint64(0xFFFFFFFF)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)


class Purpose(IntEnum):
    """What a draw is used for; draws for different purposes are independent.

    The numbers start at 16 to stay clear of the purposes of noise (``pixelflow_kernels.philox``), whose seed may be the
    same.
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
    """Draw random 32-bit words: ``[n, count]`` int64, 0 to 2^32 - 1.

    The first words of a position do not depend on ``count``.

    Args:
        seed: 0 to 2^64 - 1.
        purpose: what the words are used for.
        positions: ``[n]`` int64, 0 or more.
        count: number of words per position.

    Raises:
        ValueError: the seed is out of range.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    return words_for(seed, {purpose: count}, positions)[purpose]


def words_for(seed: int, counts: Mapping[Purpose, int], positions: Tensor) -> dict[Purpose, Tensor]:
    """Draw words for several purposes at the same positions in one call, each with the values that :func:`words` gives.

    A call of Philox takes some fifty array operations, however few words it draws, so the draws of a step are made
    together. NumPy is used because its overhead per operation is lower than torch's.

    Args:
        seed: 0 to 2^64 - 1.
        counts: number of words per position, by purpose.
        positions: ``[n]`` int64, 0 or more.

    Returns:
        the words ``[n, count]`` int64, by purpose.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
    blocks = {purpose: -(-count // 4) for purpose, count in counts.items()}
    at = positions.numpy().astype(np.uint64)[:, None]
    counter = np.zeros((4, len(at), sum(blocks.values())), np.uint64)
    counter[0], counter[1] = at & _MASK32, at >> _WORD
    counter[2] = np.repeat(np.fromiter(blocks, np.uint64), list(blocks.values()))
    counter[3] = np.concatenate([np.arange(many, dtype=np.uint64) for many in blocks.values()])
    drawn = torch.from_numpy(_philox4x32(counter, seed).transpose(1, 2, 0).astype(np.int64))
    parts = drawn.split(list(blocks.values()), dim=1)
    return {purpose: part.flatten(1)[:, :count] for (purpose, count), part in zip(counts.items(), parts, strict=True)}


def _philox4x32(counter: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters ``[4, ...]`` under one key: the function of ``pixelflow_kernels.philox``, in NumPy."""
    even, odd = counter[0::2], counter[1::2]  # each round multiplies the first and the third word
    alone = (2, *[1] * (counter.ndim - 1))
    multipliers, steps = _MULTIPLIERS.reshape(alone), _KEY_STEPS.reshape(alone)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64).reshape(alone)
    for _ in range(10):
        product = even * multipliers
        even, odd = (product >> _WORD)[::-1] ^ odd ^ key, (product & _MASK32)[::-1]
        key = (key + steps) & _MASK32
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seed: int, purpose: Purpose, positions: Tensor, count: int) -> Tensor:
    """Draw uniforms ``[n, count]`` float64 in [0, 1), multiples of 2^-53; arguments as in :func:`words`."""
    return as_uniforms(words(seed, purpose, positions, 2 * count))


def integers(seed: int, purpose: Purpose, positions: Tensor, bound: int) -> Tensor:
    """Draw integers ``[n]`` int64 in [0, bound), with ``bound`` below 2^31; other arguments as in :func:`words`."""
    return as_integers(words(seed, purpose, positions, 2), bound)


def seeds(seed: int, purpose: Purpose, positions: Tensor) -> Tensor:
    """Draw seeds ``[n]`` int64 of 64 random bits; arguments as in :func:`words`."""
    return as_seeds(words(seed, purpose, positions, 2))


def as_uniforms(drawn: Tensor) -> Tensor:
    """Convert words ``[n, 2 count]`` int64 to uniforms ``[n, count]`` float64, see :func:`uniforms`."""
    high, low = drawn.unflatten(1, (-1, 2)).unbind(-1)
    return (high << 21 | low >> 11).double() * 2.0**-53


def as_integers(drawn: Tensor, bound: int) -> Tensor:
    """Convert words ``[n, 2]`` int64 to integers ``[n]`` int64 from 0 to ``bound - 1``, ``bound`` below 2^31.

    The result is exactly ``floor(bound w / 2^64)`` of a 64-bit number w, so probabilities differ by a relative 2^-33 at
    most.

    Raises:
        ValueError: the bound is out of range.
    """
    if not 1 <= bound < 2**31:
        raise ValueError(f"bound: got {bound}, expected 1 to 2^31 - 1")
    high, low = drawn.unbind(-1)
    return (high * bound + (low * bound >> 32)) >> 32


def as_seeds(drawn: Tensor) -> Tensor:
    """Convert words ``[n, 2]`` int64 to seeds ``[n]`` int64."""
    low, high = drawn.unbind(-1)
    return high << 32 | low


def new_seed(seed: int, purpose: Purpose, position: int = 0) -> int:
    """Derive a seed from 0 to 2^64 - 1 for draws that are independent of those of ``seed``."""
    return int(seeds(seed, purpose, torch.tensor([position]))[0]) % 2**64


def sample_ids(seed: int, positions: Tensor, dataset_size: int) -> Tensor:
    """Return which sample is used at each position, ``[n]`` int64: every epoch is a permutation of the data set.

    Args:
        seed: 0 to 2^64 - 1.
        positions: ``[n]`` int64, numbers of samples consumed before.
        dataset_size: number of samples.
    """
    ids = torch.empty_like(positions)
    epochs = positions // dataset_size
    for epoch in epochs.unique().tolist():
        now = epochs == epoch
        ids[now] = _epoch_order(seed, epoch, dataset_size)[positions[now] % dataset_size]
    return ids


@lru_cache(maxsize=2)  # a step may span the end of one epoch and the beginning of the next
def _epoch_order(seed: int, epoch: int, dataset_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(new_seed(seed, Purpose.ORDER, epoch))
    return torch.randperm(dataset_size, generator=generator)


def balanced_stages(seed: int, step: int, batch_size: int, num_stages: int) -> Tensor:
    """Draw the stages of a step's images in random order: ``[batch_size]`` int64, counts differing by at most one.

    The step has as many images of each stage as its positions have remainders modulo ``num_stages``. The stages that
    have one more image therefore take turns, and the counts accumulated over all steps differ by at most one, too.
    """
    first = step * batch_size
    stages = torch.arange(first, first + batch_size) % num_stages
    order = uniforms(seed, Purpose.STAGE, torch.tensor([step]), batch_size)[0].argsort(stable=True)
    return stages[order]

"""Random draws as pure functions of (seed, purpose, position), so that a place in training is an integer."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a draw is for; draws of different purposes are independent."""

    WEIGHTS = 0
    ORDER = 1
    BATCH = 2
    AUGMENT = 3
    HELD_OUT = 4


def generator(seed: int, purpose: Purpose, position: int = 0) -> torch.Generator:
    """A CPU generator for one draw."""
    state = np.random.SeedSequence([seed, int(purpose), position]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def sample_ids(seed: int, step: int, batch_size: int, dataset_size: int) -> torch.Tensor:
    """Which samples a step sees: ``[batch_size]``. Every epoch is a permutation; batches run on across epochs."""
    first = step * batch_size
    ids: list[int] = []
    while len(ids) < batch_size:
        epoch, offset = divmod(first + len(ids), dataset_size)
        order = torch.randperm(dataset_size, generator=generator(seed, Purpose.ORDER, epoch))
        ids += order[offset : offset + batch_size - len(ids)].tolist()
    return torch.tensor(ids)

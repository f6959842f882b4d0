"""Watching the losses: what is too large beside what came before it, and by which stage."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 64  # losses that a stage's running median is of
ENOUGH = 16  # losses that it takes before one can stand out


class Spike(NamedTuple):
    """A stage's loss that stands out, and the median that it stands out from."""

    stage: int
    loss: float
    median: float


class LossHistory:
    """The last losses of each stage.

    Args:
        num_stages: S.
        factor: a loss above this many times its stage's running median is a spike.
    """

    def __init__(self, num_stages: int, factor: float) -> None:
        self.factor = factor
        self._losses: list[deque[float]] = [deque(maxlen=WINDOW) for _ in range(num_stages)]

    def add(self, losses: Sequence[float | None]) -> list[Spike]:
        """Take in a step's finite losses, one for each stage (None where it had no image), and tell the spikes.

        A spike is taken in like any other: a median of many does not mind, and a lasting rise ends by being the rule.
        """
        spikes = []
        for stage, (loss, history) in enumerate(zip(losses, self._losses, strict=True)):
            if loss is None:
                continue
            if len(history) >= ENOUGH and loss > self.factor * (median := statistics.median(history)):
                spikes.append(Spike(stage, loss, median))
            history.append(loss)
        return spikes

    def tensor(self) -> Tensor:
        """``[S, WINDOW]`` float64, oldest first, filled up with NaN."""
        rows = [[*history, *[math.nan] * (WINDOW - len(history))] for history in self._losses]
        return torch.tensor(rows, dtype=torch.float64)

    def load(self, tensor: Tensor) -> None:
        """The inverse of :meth:`tensor`."""
        for history, row in zip(self._losses, tensor.tolist(), strict=True):
            history.clear()
            history.extend(loss for loss in row if not math.isnan(loss))

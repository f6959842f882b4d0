"""Detection of loss spikes: losses of a stage that are far above those of its recent steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 64  # number of losses in a stage's running median
ENOUGH = 16  # number of losses needed before one can be a spike


class Spike(NamedTuple):
    """A stage's loss that is a spike, and the running median that it exceeds."""

    stage: int
    loss: float
    median: float


class LossHistory:
    """The most recent losses of each stage.

    Args:
        num_stages: S.
        factor: a loss above this many times its stage's running median is a spike.
    """

    def __init__(self, num_stages: int, factor: float) -> None:
        self.factor = factor
        self._losses: list[deque[float]] = [deque(maxlen=WINDOW) for _ in range(num_stages)]

    def add(self, losses: Sequence[float | None]) -> list[Spike]:
        """Append a step's finite losses, one per stage (None for a stage without images), and return the spikes.

        Spikes are appended as well: they hardly move a median of many losses, and after a lasting rise the higher
        losses become the median.
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
        """Return the history as ``[S, WINDOW]`` float64, oldest first, padded with NaN."""
        rows = [[*history, *[math.nan] * (WINDOW - len(history))] for history in self._losses]
        return torch.tensor(rows, dtype=torch.float64)

    def load(self, tensor: Tensor) -> None:
        """Restore what :meth:`tensor` has returned."""
        for history, row in zip(self._losses, tensor.tolist(), strict=True):
            history.clear()
            history.extend(loss for loss in row if not math.isnan(loss))

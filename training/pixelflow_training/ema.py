"""Exponential moving average of a model's parameters."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Averaged weights: ``ema += (1 - decay) (model - ema)`` after every step.

    Args:
        model: the model to average; copied as the initial average.
        decay: upper limit of the decay, which rises as ``(1 + step) / (10 + step)`` so that the initial weights are
            forgotten early.

    Attributes:
        model: the averaged model, in evaluation mode and without gradients.
        step: number of updates.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.model: M = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.step = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the averages from the current weights of ``model``."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
        self.step += 1

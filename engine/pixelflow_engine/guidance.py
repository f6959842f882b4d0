"""Classifier-free guidance: the weight at each stage, and how the two halves are combined."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .config import ModelConfig

PUBLISHED_FRACTIONS = (0.0, 1 / 6, 2 / 3, 1.0)
"""The fraction of ``scale - 1`` that each of the four published stages gets (arXiv 2504.07963, section 4.3)."""


def default_scale(model: ModelConfig) -> float:
    """2.4, the published scale of the class-conditional model; 1 for a model without any condition to guide by."""
    return 2.4 if model.num_classes > 0 or model.cross_attention_dim is not None else 1.0


def default_schedule(model: ModelConfig) -> Literal["stagewise", "constant"]:
    """``constant`` for a text model, ``stagewise`` for others, as published."""
    return "constant" if model.cross_attention_dim is not None else "stagewise"


def stagewise_weights(scale: float, num_stages: int) -> tuple[float, ...]:
    """``1 + (scale - 1) * fraction_s``: no guidance at the first stage, the full scale at the last.

    Four stages use the published fractions. Other numbers of stages interpolate them piecewise linearly, keeping both
    ends; a single stage has the full weight.
    """
    return tuple((scale - 1) * _fraction(s, num_stages) + 1 for s in range(num_stages))


def _fraction(stage: int, num_stages: int) -> float:
    last = len(PUBLISHED_FRACTIONS) - 1
    position = last * stage / (num_stages - 1) if num_stages > 1 else float(last)
    left = min(int(position), last - 1)
    low, high = PUBLISHED_FRACTIONS[left], PUBLISHED_FRACTIONS[left + 1]
    return low + (position - left) * (high - low)


def combine(both: Tensor, weight: float) -> Tensor:
    """``v_null + w (v_cond - v_null)`` for a batch whose first half is the null half: ``[2B, ...] -> [B, ...]``."""
    null, conditional = both.chunk(2)
    return null + weight * (conditional - null)

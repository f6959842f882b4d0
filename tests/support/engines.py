"""Small engines with random values in every parameter, including those that initialization sets to zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pixelflow_engine import ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig
from pixelflow_engine.model import PackedTransformer

from .reference_models import randomize, seeded

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "depth": 1, "patch_size": 2, "num_classes": 5}


def tiny_config(num_stages: int = 3, resolution: int = 16, **model_overrides: Any) -> PixelFlowConfig:
    """Return a cascade 4 -> 8 -> 16 pixels with five classes, unless overridden."""
    model = ModelConfig(**(TINY | model_overrides))  # type: ignore[arg-type]
    return PixelFlowConfig(model=model, scheduler=SchedulerConfig(num_stages=num_stages), resolution=resolution)


def tiny_model(config: PixelFlowConfig, seed: int = 1) -> PackedTransformer:
    """Return a model of that shape with random weights, without using any global random stream."""
    with torch.device("meta"):
        model = PackedTransformer(config.model)
    model.to_empty(device="cpu")
    randomize(model, seeded(seed))
    return model


@contextmanager
def uncompiled() -> Iterator[None]:
    """Make engines created in the context take the fast path with uncompiled blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixelflow_engine.engine.compile_blocks", lambda model: None)
        yield


def tiny_engine(num_stages: int = 3, resolution: int = 16, seed: int = 1, **model_overrides: Any) -> PixelFlowEngine:
    """Return an engine with such a model.

    Args:
        num_stages, resolution: of the cascade.
        seed: seed of the weights.
        model_overrides: fields of :class:`ModelConfig`, e.g. ``num_classes=0, cross_attention_dim=12``.
    """
    config = tiny_config(num_stages, resolution, **model_overrides)
    return PixelFlowEngine(config, tiny_model(config, seed))

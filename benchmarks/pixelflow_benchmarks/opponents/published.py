"""Parts taken from a checkout of the published code, in the process that imports it (see :mod:`.public_code`)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from pixelflow_engine import PixelFlowConfig


def rotary_places(side: int, head_dim: int) -> torch.Tensor:
    """Return the table of cosines and sines that the published sampler makes for square images."""
    embeddings = importlib.import_module("diffusers.models.embeddings")
    table = embeddings.get_2d_rotary_pos_embed(
        embed_dim=head_dim, crops_coords=((0, 0), (side, side)), grid_size=(side, side)
    )
    return torch.stack([torch.as_tensor(part) for part in table], dim=-1)


def import_published(path: Path, name: str) -> Any:
    """Import a module of the checkout.

    Raises:
        FileNotFoundError: there is no checkout at ``path``.
    """
    if not (path / "pixelflow" / "model.py").is_file():
        raise FileNotFoundError(f"public: got {path}, expected a folder with pixelflow/model.py")
    sys.path.insert(0, str(path))
    return importlib.import_module(name)


def published_model(published: Any, config: PixelFlowConfig) -> Any:
    """Return the published model of that shape, with its own initialization."""
    names = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "depth", "patch_size")
    fields = {name: getattr(config.model, name) for name in (*names, "attention_bias", "num_classes")}
    return published.PixelFlowModel(**fields)

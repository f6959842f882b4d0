"""A training recipe small enough for a test: the digits at 8 and 16 pixels, grey."""

from __future__ import annotations

from pathlib import Path

from pixelflow_training.config import TrainConfig, load_config

TINY_RECIPE = """
model: {num_attention_heads: 2, attention_head_dim: 8, depth: 1, in_channels: 1, out_channels: 1, num_classes: 10}
scheduler: {num_stages: 2}
resolution: 16
data: {held_out: 200, augment: {rotate: 6.0, scale: 0.06, shift: 0.03}}
optimizer: {lr: 3.0e-3, warmup_steps: 3, schedule: cosine}
steps: 10
batch_size: 8
ema_decay: 0.9
log_every: 1
eval_every: 5
"""


def tiny_recipe(folder: Path, *overrides: str) -> TrainConfig:
    """Return the recipe, read from a file in ``folder``, with ``key=value`` overrides."""
    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE, encoding="utf-8")
    return load_config(str(path), overrides)

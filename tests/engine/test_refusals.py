"""What a refused checkpoint says, and how soon: no file rewrites a terminal or keeps a reader busy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pixelflow_engine.checkpoint.text import LARGEST_CONFIG, parse_json
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError

CONFIG = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=1, attention_head_dim=4, depth=1, num_classes=3),
    scheduler=SchedulerConfig(num_stages=2),
    resolution=16,
)
WEIGHTS = {name: torch.zeros(shape) for name, shape in parameter_shapes(CONFIG.model).items()}
CLEARS_THE_SCREEN = "\x1b[2J"


@pytest.mark.parametrize("text", [b'"' + b'\\"' * LARGEST_CONFIG, b'"' * LARGEST_CONFIG, b"\\" * LARGEST_CONFIG])
def test_json_is_read_once(text: bytes) -> None:
    """The largest file takes milliseconds; reading the rest anew at every quote took 14 seconds."""
    began = time.process_time()
    with pytest.raises(CheckpointError):
        parse_json(text[:LARGEST_CONFIG], Path("config.json"))
    assert time.process_time() - began < 3


@pytest.mark.parametrize("text", [b'{"a": "[[[' + b"[" * 40 + b'"}', b'{"\\"[": "' + b"\\\\" * 40 + b'"}'])
def test_brackets_in_strings_are_no_depth(text: bytes) -> None:
    assert parse_json(text, Path("config.json"))

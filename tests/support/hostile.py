"""Checkpoints from elsewhere, for tests: a good one of each form to be changed, and how loading has to end."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pixelflow_engine.checkpoint import convert, load_checkpoint, save_checkpoint
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError

CONFIG = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=1, attention_head_dim=4, depth=1, patch_size=2, num_classes=3),
    scheduler=SchedulerConfig(num_stages=2),
    resolution=16,
)
HEAD = "proj_out_2.weight"  # [12, 4]
Weights = dict[str, Tensor]


def some_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator) for n, shape in parameter_shapes(CONFIG.model).items()}


def write_both_forms(folder: Path) -> None:
    """Write the good checkpoint as ``ours`` and ``public``."""
    save_checkpoint(folder / "ours", CONFIG, some_weights())
    convert(folder / "ours", folder / "public", to="public")


def refused(checkpoint: Path, file: Path, why: str) -> None:
    """Loading ends in a CheckpointError that names the file and says why, in few words."""
    with pytest.raises(CheckpointError) as info:
        load_checkpoint(checkpoint)
    message = str(info.value)
    assert message.startswith(f"{file}: "), message
    assert re.search(why, message), message
    assert len(message) < len(str(file)) + 1000
    assert "\n" not in message


def edit_yaml(public: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((public / "config.yaml").read_text())
    edit(config)
    (public / "config.yaml").write_text(yaml.safe_dump(config))


def without_head(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


def with_head(change: Callable[[Tensor], Any]) -> Callable[[Weights], Any]:
    return lambda weights: weights | {HEAD: change(weights[HEAD])}


def spoiled(value: float) -> Callable[[Weights], Any]:
    return with_head(lambda t: t.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value)))


BAD_WEIGHTS = [
    (without_head, f"missing {HEAD}"),
    (lambda w: w | {"more": torch.zeros(1)}, "not part of the model: more"),
    (
        lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
        "missing .* and .* more; not part .*; all names begin with 'module.', as DistributedDataParallel makes them",
    ),
    (
        lambda w: {f"_orig_mod.{name}": tensor for name, tensor in w.items()},
        "; all names begin with '_orig_mod.', as torch.compile makes them: save the state dict of the model",
    ),
    (lambda w: {f"module.{n}" if n == HEAD else n: t for n, t in w.items()}, f"not part of the model: module.{HEAD}$"),
    (with_head(lambda t: t[:-1].clone()), r"got shape \[11, 4\], expected \[12, 4\]"),
    (with_head(lambda t: t.reshape(4, 12)), r"got shape \[4, 12\], expected \[12, 4\]"),
    (with_head(lambda t: t[None]), r"got shape \[1, 12, 4\]"),
    (with_head(lambda t: t.to(torch.int32)), "got type"),
    (with_head(lambda t: t > 0), "got type"),
    (spoiled(float("nan")), "1 of 48 values are not finite"),
    (spoiled(float("inf")), "1 of 48 values are not finite"),
]


def assert_survives_or_refuses(checkpoint: Path, path: Path, good: bytes, positions: list[int]) -> tuple[int, int]:
    """Flip one bit at a time: the same checkpoint comes back, or none. Returns how often it did which."""
    messages: list[str] = []
    weights = {name: tensor.numpy().tobytes() for name, tensor in some_weights().items()}
    for position in positions:
        data = bytearray(good)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            got = load_checkpoint(checkpoint)
        except CheckpointError as error:
            messages.append(str(error))
            continue
        where = f"{path.name}: bit {position % 8} of byte {position // 8}"
        assert got.config == CONFIG, where
        assert {n: t.numpy().tobytes() for n, t in got.state_dict.items()} == weights, where
        assert all(t.dtype == torch.float32 for t in got.state_dict.values()), where
        assert {n: tuple(t.shape) for n, t in got.state_dict.items()} == parameter_shapes(CONFIG.model), where
    path.write_bytes(good)
    assert all(message.startswith(str(checkpoint)) for message in messages)
    return len(messages), len(positions) - len(messages)

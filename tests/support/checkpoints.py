"""Small checkpoints for tests: configurations, weights whose bits are easily lost, files as training leaves them."""

from __future__ import annotations

import argparse
import random
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from pixelflow_engine.checkpoint import Checkpoint
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, parameter_shapes

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Weights = dict[str, Tensor]


def tiny_config(**model: Any) -> PixelFlowConfig:
    shape = {"num_attention_heads": 1, "attention_head_dim": 4, "depth": 1, "patch_size": 2, "num_classes": 3} | model
    return PixelFlowConfig(model=ModelConfig(**shape), scheduler=SchedulerConfig(num_stages=2), resolution=16)


def drawn_config() -> PixelFlowConfig:
    """A small configuration, another one in every run."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    model = ModelConfig(
        num_attention_heads=draw.randint(1, 3),
        attention_head_dim=draw.choice([4, 8, 12]),
        depth=draw.randint(1, 3),
        in_channels=(channels := draw.randint(1, 4)),
        out_channels=channels,
        patch_size=draw.choice([1, 2, 4]),
        num_classes=draw.choice([0, 1, 10]),
        attention_bias=draw.random() < 0.5,
        cross_attention_dim=draw.choice([None, 1, 24]),
        dropout=draw.choice([0.0, 1e-5, draw.random()]),
    )
    scheduler = SchedulerConfig(num_train_timesteps=draw.randint(2, 2000), num_stages=draw.randint(1, 4))
    side = model.patch_size * 2 ** (scheduler.num_stages - 1)
    return PixelFlowConfig(model=model, scheduler=scheduler, resolution=side * draw.randint(1, 9))


def random_weights(config: PixelFlowConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Normals, and in the first tensor values whose bits are easily lost: signed zeros and denormals."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config.model)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    delicate = torch.tensor([-0.0, 0.0, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max], dtype=dtype)
    next(iter(weights.values())).view(-1)[:4] = delicate[: next(iter(weights.values())).numel()]
    return weights


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def digests(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Everything that a tensor is, comparable: unlike with ==, -0.0 is not 0.0."""
    return {name: (tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in weights.items()}


def assert_same(got: Checkpoint, config: PixelFlowConfig, weights: Mapping[str, Tensor]) -> None:
    assert got.config == config
    assert list(got.state_dict) == list(parameter_shapes(config.model)), "not in the published order"
    assert digests(got.state_dict) == digests(weights)
    for name, tensor in got.state_dict.items():
        assert type(tensor) is Tensor, name
        assert tensor.is_contiguous(), name
        assert not tensor.requires_grad, name


def write_training_checkpoint(path: Path, config: PixelFlowConfig, model: Weights, ema: Weights | None) -> None:
    """What a training run leaves: parameters that took an optimizer step, and the command line as a Namespace."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in model.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = OrderedDict(model)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as nn.Module writes it
    content: dict[str, Any] = {"model": state, "opt": optimizer.state_dict()}
    content["args"] = argparse.Namespace(lr=1e-4, name="run", resume=None, sizes=[1, 2], pair=(1.0, True), many=2**40)
    if ema is not None:
        content["ema"] = {name: torch.nn.Parameter(tensor) for name, tensor in ema.items()}
    torch.save(content, path)
    write_public_config(path.with_name("config.yaml"), config)


def write_public_config(path: Path, config: PixelFlowConfig) -> None:
    """A config.yaml as training runs have it, with every section."""
    params = {key: value for key, value in config.to_dict()["model"].items() if value is not None}
    content = {
        "model": {"target": "pixelflow.model.PixelFlowModel", "params": params},
        "scheduler": config.to_dict()["scheduler"] | {"pyramid_shift": False},
        "train": {"lr": 1e-4, "anything": ["goes", {"here": None}]},
        "data": {
            "root": "images", "center_crop": False, "resolution": config.resolution, "expand_ratio": 1.125,
            "num_workers": 12, "batch_size": 16,
        },
        "seed": 42,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))

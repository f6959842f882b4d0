"""The public checkpoint forms: ``config.yaml`` beside a ``.pt`` file, a plain state dict or a training checkpoint."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from pixelflow_engine.config import (
    ModelConfig,
    PixelFlowConfig,
    SchedulerConfig,
    from_mapping,
    parameter_shapes,
)
from pixelflow_engine.errors import CheckpointError, ConfigError

from .archive import check_archive
from .problems import about
from .tensors import check_finite, check_layout, plain_layout
from .text import parse_yaml, read_config_bytes

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.pt"
TARGET = "pixelflow.model.PixelFlowModel"  # the class that the public code expects; never imported here

Weights = Literal["auto", "ema", "model"]


@dataclass(frozen=True, kw_only=True)
class _Model:
    target: str
    params: ModelConfig


@dataclass(frozen=True, kw_only=True)
class _Scheduler:
    # No defaults, unlike in SchedulerConfig: a wrong value would not contradict any tensor's shape.
    num_train_timesteps: int
    num_stages: int
    pyramid_shift: bool = False

    def __post_init__(self) -> None:
        if self.pyramid_shift:
            raise ConfigError(
                "scheduler.pyramid_shift: got true, expected false or nothing: such a model was trained on other "
                "time windows than the published schedule's, and only that one is implemented"
            )


@dataclass(frozen=True, kw_only=True)
class _File:
    model: _Model
    scheduler: _Scheduler
    data: object
    train: object = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.train, Mapping | None):
            raise ConfigError(f"train: got {type(self.train).__name__}, expected a mapping")


def read_public(weights_path: Path, weights: Weights) -> tuple[PixelFlowConfig, dict[str, Tensor]]:
    """Read a ``.pt`` file and the ``config.yaml`` beside it.

    Args:
        weights_path: a state dict, or a training checkpoint with the keys model, ema, opt and args.
        weights: which weights of a training checkpoint: "ema", "model", or "auto", which takes the moving average if
            there is one.

    Returns:
        The configuration, and the weights in the published order, as tensors that own their memory.

    Raises:
        CheckpointError: a file is missing or malformed, or the two do not match.
    """
    config = _read_config(weights_path.with_name(CONFIG_FILE))
    check_archive(weights_path)
    content = _unpickled(weights_path)
    chosen = _choose(content, weights, weights_path)
    check_layout(plain_layout(chosen, weights_path), config.model, weights_path)
    return config, _copied(chosen, config.model, weights_path)


def write_public(folder: Path, config: PixelFlowConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Write ``config.yaml`` and ``model.pt``, a plain state dict, into a folder.

    Args:
        folder: an existing folder; files of these names are replaced.
        config, state_dict: already validated.
    """
    _write_config(folder / CONFIG_FILE, config)
    torch.save(_with_own_storage(state_dict), folder / WEIGHTS_FILE)


def training_file(step: int) -> str:
    """File name of a training checkpoint at a given step."""
    return f"model_{step}.pt"


def write_public_training(
    folder: Path, config: PixelFlowConfig, sets: Mapping[str, Mapping[str, Tensor]], step: int
) -> None:
    """Write ``config.yaml`` and a training checkpoint with the keys ``model`` and ``ema`` into a folder.

    Args:
        folder: an existing folder; files of these names are replaced.
        config, sets: already validated.
        step: training step, for the file name.
    """
    _write_config(folder / CONFIG_FILE, config)
    torch.save({key: _with_own_storage(weights) for key, weights in sets.items()}, folder / training_file(step))


def _write_config(path: Path, config: PixelFlowConfig) -> None:
    params = {key: value for key, value in config.to_dict()["model"].items() if value is not None}
    content = {
        "model": {"target": TARGET, "params": params},
        "scheduler": config.to_dict()["scheduler"],
        "data": {"resolution": config.resolution},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _read_config(path: Path) -> PixelFlowConfig:
    data = parse_yaml(read_config_bytes(path), path)
    with about(path, ConfigError, ValueError, OverflowError):
        file = from_mapping(_File, data, "config")
        if not isinstance(file.data, Mapping) or "resolution" not in file.data:
            raise ConfigError("data: expected a mapping with the key resolution")
        times, stages = file.scheduler.num_train_timesteps, file.scheduler.num_stages
        scheduler = SchedulerConfig(num_train_timesteps=times, num_stages=stages)
        return PixelFlowConfig(model=file.model.params, scheduler=scheduler, resolution=file.data["resolution"])


# torch's list of safe classes is process-wide, and leaving its context removes what another thread has added.
_ALLOWED_CLASSES_LOCK = threading.Lock()


def _unpickled(path: Path) -> object:
    """Content of a validated file. Its tensors map the file, so only those that are used are read."""
    # Exception: torch's reader raises nearly any built-in error on malformed input.
    with about(path, Exception), _ALLOWED_CLASSES_LOCK:
        # Not added if the calling program allows it already: leaving the context would revoke that.
        allowed = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _choose(content: Any, weights: Weights, path: Path) -> Any:
    """The state dict in a file's content. No parameter is called "model" or "ema", so these keys identify the form."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict")
    if "model" not in content and "ema" not in content:
        refuse_choice(weights, path)
        return content
    key = weights if weights != "auto" else "ema" if content.get("ema") is not None else "model"
    if content.get(key) is None:
        raise CheckpointError(f"{path}: a training checkpoint without weights under the key {key}")
    return content[key]


def refuse_choice(weights: Weights, path: Path) -> None:
    """Refuse a choice of weights for a checkpoint that has only one, unnamed set of them."""
    if weights != "auto":
        raise CheckpointError(f"{path}: asked for {weights!r} weights, but this is no training checkpoint: use 'auto'")


def _copied(state_dict: Mapping[str, Tensor], model: ModelConfig, path: Path) -> dict[str, Tensor]:
    """Copies in the published order, out of the mapped file, which could still change."""
    total, size = sum(tensor.nbytes for tensor in state_dict.values()), path.stat().st_size
    if total > size:  # with zero strides, a few bytes can pose as a tensor of any size
        raise CheckpointError(
            f"{path}: tensors of {total} bytes in a file of {size}: they share or repeat their memory"
        )
    ordered = {name: state_dict[name].detach() for name in parameter_shapes(model)}
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in ordered.items()}
    for name, tensor in copies.items():
        check_finite(name, tensor, path)
    return copies


def _with_own_storage(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors with a storage each: ``torch.save`` writes whole storages, and shared ones only once."""
    seen: set[int] = set()
    alone: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        tensor, storage = value.detach(), value.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        alone[name] = tensor.clone() if shared else tensor
    return alone

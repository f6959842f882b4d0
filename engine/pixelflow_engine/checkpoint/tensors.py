"""Validation of a state dict, and digests of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pixelflow_engine.config import ModelConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError

from .problems import listed

# By their names in the safetensors format.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
"""What wraps a model, by the prefix that it gives to all names in a state dict."""


def check_layout(layout: Mapping[str, tuple[str, tuple[int, ...]]], model: ModelConfig, path: Path) -> None:
    """Check names, shapes and dtypes against the model's, without reading any tensor.

    Args:
        layout: dtype name and shape of every tensor, by tensor name.
        model: the model's configuration.
        path: the file, for messages.

    Raises:
        CheckpointError: names, shapes or dtypes do not match.
    """
    expected = parameter_shapes(model)
    missing = [name for name in expected if name not in layout]
    extra = [name for name in layout if name not in expected]
    if missing or extra:
        problems = [f"missing {listed(missing)}"] if missing else []
        problems += [f"not part of the model: {listed(extra)}"] if extra else []
        problems += [
            f"all names begin with {prefix!r}, as {wrapper} makes them: save the state dict of the model that it wraps"
            for prefix, wrapper in WRAPPERS.items()
            if layout and all(name.startswith(prefix) for name in layout)
        ]
        raise CheckpointError(f"{path}: {len(layout)} tensors, expected {len(expected)}; {'; '.join(problems)}")
    for name, (dtype, shape) in layout.items():
        if shape != expected[name]:
            raise CheckpointError(f"{path}: {name}: got shape {list(shape)}, expected {list(expected[name])}")
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name}: got type {dtype}, expected one of {', '.join(DTYPES)}")


def plain_layout(state_dict: object, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout of an untrusted state dict.

    Args:
        state_dict: expected to map names to dense CPU tensors.
        path: the file, for messages.

    Returns:
        What :func:`check_layout` accepts; a dtype that no checkpoint has is given by its torch name.

    Raises:
        CheckpointError: it does not map names to dense CPU tensors.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"{path}: the weights are a {type(state_dict).__name__}, expected a dict of tensors")
    for name, value in state_dict.items():
        if type(name) is not str:
            raise CheckpointError(f"{path}: a tensor's name is a {type(name).__name__}, expected a string")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{path}: {listed([name])}: got a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_neg():
            raise CheckpointError(
                f"{path}: {listed([name])}: got {value.layout} on {value.device}, expected a dense tensor on cpu"
            )
    return {
        name: (DTYPE_NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in state_dict.items()
    }


def check_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse NaN and infinite weights, which would make every output NaN."""
    smallest, largest = torch.aminmax(tensor.detach())  # NaN if any value is; far faster than testing each
    if not (smallest.isfinite() and largest.isfinite()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(f"{path}: {name}: {bad} of {tensor.numel()} values are not finite")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a contiguous CPU tensor as bytes, in the machine's byte order, without a copy."""
    values: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return values.data


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over type, shape and values, in hexadecimal."""
    digest = hashlib.sha256(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()

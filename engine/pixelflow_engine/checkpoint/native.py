"""Our own checkpoint form: ``config.json`` and ``model.safetensors``, with digests of everything that is read back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixelflow_engine.config import PixelFlowConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError, ConfigError

from .problems import about, listed
from .tensors import DTYPE_NAMES, check_finite, check_layout, tensor_bytes, tensor_digest
from .text import check_is_file, parse_json, read_config_bytes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VERSION_KEY, VERSION = "pixelflow_engine.checkpoint", "1"
DIGEST_KEY = "sha256.{}"
LARGEST_HEADER = 16 * 1024 * 1024
LENGTH_BYTES = 8


def read_native(folder: Path) -> tuple[PixelFlowConfig, dict[str, Tensor]]:
    """Read a folder of our own form and verify every digest.

    Args:
        folder: contains ``config.json`` and ``model.safetensors``.

    Returns:
        The configuration, and the weights in the published order, as tensors that own their memory.

    Raises:
        CheckpointError: a file is missing, malformed, or not what was written.
    """
    path = folder / WEIGHTS_FILE
    config_bytes = read_config_bytes(folder / CONFIG_FILE)
    with about(path, OSError, SafetensorError, ValueError, OverflowError):
        _check_header_length(path)
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_version(metadata, path)
            _check_digest(CONFIG_FILE, hashlib.sha256(config_bytes).hexdigest(), metadata, folder / CONFIG_FILE)
            config = _parse_config(config_bytes, folder / CONFIG_FILE)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            layout = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}
            check_layout(layout, config.model, path)
            # A copy is checked and returned: the file could still change under a memory mapping.
            state_dict = {name: file.get_tensor(name).clone() for name in parameter_shapes(config.model)}
    for name, tensor in state_dict.items():
        _check_digest(name, tensor_digest(tensor), metadata, path)
        check_finite(name, tensor, path)
    return config, state_dict


def write_native(folder: Path, config: PixelFlowConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Write the two files of our form into a folder. The same model always gives the same bytes.

    Args:
        folder: an existing folder; files of these names are replaced.
        config, state_dict: already validated; the tensors are contiguous.
    """
    config_bytes = (json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n").encode()
    (folder / CONFIG_FILE).write_bytes(config_bytes)
    metadata = {"format": "pt", VERSION_KEY: VERSION}
    metadata[DIGEST_KEY.format(CONFIG_FILE)] = hashlib.sha256(config_bytes).hexdigest()
    metadata |= {DIGEST_KEY.format(name): tensor_digest(tensor) for name, tensor in state_dict.items()}
    _write_safetensors(folder / WEIGHTS_FILE, state_dict, metadata)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the safetensors package's own writer does not order the metadata deterministically.

    A file consists of the header's length (8 bytes, little-endian), the header (JSON, padded with spaces) and the
    values. All tensors are aligned, because every parameter but the last has a multiple of four elements, as the width
    is one.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(LENGTH_BYTES * math.ceil(len(text) / LENGTH_BYTES))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for tensor in tensors.values():
            file.write(tensor_bytes(tensor))


def _check_header_length(path: Path) -> None:
    check_is_file(path)
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
    length, room = int.from_bytes(prefix, "little"), path.stat().st_size - LENGTH_BYTES
    if len(prefix) < LENGTH_BYTES or length > min(room, LARGEST_HEADER):
        limit = f"at most {LARGEST_HEADER} and no more than the file holds"
        raise CheckpointError(f"{path}: not a whole safetensors file: header of {length} bytes, expected {limit}")


def _check_version(metadata: Mapping[str, str], path: Path) -> None:
    version = metadata.get(VERSION_KEY)
    if version != VERSION:
        raise CheckpointError(f"{path}: got {VERSION_KEY} {listed([str(version)])} in its metadata, expected {VERSION}")


def _check_digest(name: str, digest: str, metadata: Mapping[str, str], path: Path) -> None:
    expected = metadata.get(DIGEST_KEY.format(name))
    if expected is None:
        raise CheckpointError(f"{path}: {WEIGHTS_FILE} records no digest of {name}")
    if digest != expected:
        raise CheckpointError(
            f"{path}: {name} is not what was written: SHA-256 {digest}, expected {listed([expected])}"
        )


def _parse_config(data: bytes, path: Path) -> PixelFlowConfig:
    with about(path, ConfigError, ValueError, OverflowError):
        return PixelFlowConfig.from_dict(parse_json(data, path))

"""The manifest of a checkpoint: its step, recipe, versions and data listing, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pixelflow_engine.config import ModelConfig
from pixelflow_engine.errors import CheckpointError, ConfigError

from .config import TrainConfig
from .data.listing import Listing, differences
from .files import sync

MANIFEST = "manifest.json"
FORMAT = 1

# Recipe keys that change what is logged, kept or tolerated but no number of the run; and `compute`, which changes
# rounding, as another device does.
FREE = (
    "log_every", "eval_every", "loggers", "checkpoint", "guard", "samples", "compute",
    "data.workers", "data.max_skipped", "data.changed",
)  # fmt: skip

SHOWN = 5  # how many of the differing parts of the data a message lists


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        format: version of the checkpoint format; this version writes and reads 1.
        step: number of optimizer steps done; ``step * batch_size`` samples have been consumed.
        recipe: the configuration as plain data.
        versions: of this package, torch and Python, to help explain differing bits.
        files: SHA-256 of every other file of the folder.
        data: the listing of the training data; None in checkpoints of versions that stored none.
    """

    format: int
    step: int
    recipe: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]
    data: Listing | None = None

    def render(self) -> str:
        """Return the file's text.

        It includes a digest of its other contents, and the serialization is unique, so that any changed bit is
        detected.
        """
        contents = asdict(self)
        if self.data is None:  # keeps manifests of versions without listings valid
            del contents["data"]
        body = json.dumps(contents, sort_keys=True, allow_nan=False)
        return json.dumps(contents | {"sha256": _digest(body.encode())}, indent=1, sort_keys=True) + "\n"


def plain(config: TrainConfig) -> dict[str, Any]:
    """Return a recipe as JSON represents it: lists for tuples."""
    data: dict[str, Any] = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    return data


def write_manifest(folder: Path, step: int, config: TrainConfig, data: Listing | None = None) -> None:
    """Digest every file of a folder, write the manifest beside them and synchronize all of them to the disk."""
    manifest = Manifest(
        format=FORMAT,
        step=step,
        recipe=plain(config),
        versions={
            "pixelflow-engine": metadata.version("pixelflow-engine"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        files={file.name: file_digest(file) for file in sorted(folder.iterdir())},
        data=data,
    )
    (folder / MANIFEST).write_text(manifest.render(), encoding="utf-8")
    # All files, not only the manifest: torch's writer calls fsync while the end of a file is still buffered.
    for file in sorted(folder.iterdir()):
        sync(file)
    sync(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest, without checking the files that it lists.

    Raises:
        CheckpointError: the manifest is missing, of another format, or not what was written.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        data.pop("sha256")
        manifest = Manifest(**data)
        intact = manifest.render() == text
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}") from error
    if not intact:
        raise CheckpointError(f"{path}: not what was written: its digest does not agree")
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: got format {manifest.format}, expected {FORMAT}")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Check that a folder holds exactly the files of its manifest, bit for bit.

    Raises:
        CheckpointError: the message names the first file that is missing, changed or unknown.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if (digest := file_digest(path)) != expected:
            raise CheckpointError(f"{path}: not what was written: SHA-256 {digest}, expected {expected}")
    for path in sorted(folder.iterdir()):
        if path.name not in (MANIFEST, *manifest.files):
            raise CheckpointError(f"{path}: not in {MANIFEST}")


def check_recipe(folder: Path, manifest: Manifest, config: TrainConfig) -> None:
    """Refuse to resume with another recipe.

    These keys may differ: ``log_every``, ``eval_every``, ``loggers``, ``checkpoint``, ``guard``, ``samples``,
    ``data.workers``, ``data.max_skipped`` and ``data.changed``, which change no number; ``compute``, which changes
    rounding; ``steps`` under a constant learning rate, so that a finished run can be made longer; and ``data.path`` if
    the checkpoint has a listing, by which :func:`check_data` detects other images. A key that an earlier version lacked
    takes its default, which is what that version did.

    Raises:
        ConfigError: the message names every key that differs, with both values, and every unknown key, including
            unknown keys in groups that may differ.
    """
    free = [*FREE]
    if config.optimizer.schedule == "constant":
        free.append("steps")
    if manifest.data is not None:
        free.append("data.path")
    defaults = plain(TrainConfig(model=ModelConfig(num_attention_heads=1, attention_head_dim=8, depth=1)))
    before, now = _flat(defaults) | _flat(manifest.recipe), _flat(plain(config))
    changed = [
        f"{key}: got {json.dumps(now[key])}, the checkpoint has {json.dumps(before[key])}"
        if key in now
        else f"{key}: not known to this version, the checkpoint has {json.dumps(before[key])}"
        for key in sorted(before)
        if key not in now
        or (before[key] != now[key] and not any(key == name or key.startswith(f"{name}.") for name in free))
    ]
    if changed:
        raise ConfigError(f"{folder}: written by another recipe: {'; '.join(changed)}")


def check_data(folder: Path, manifest: Manifest, data: Listing | None, changed: str) -> list[str]:
    """Refuse to resume with other images, because the result would then depend on when the run was stopped.

    Args:
        folder, manifest: the checkpoint; one without a listing is not compared.
        data: the listing of the data that are there now.
        changed: the recipe's ``data.changed``.

    Returns:
        the differences that were accepted: the parts that were added, changed or removed, one line each for the first
            ones.

    Raises:
        ConfigError: the message names the parts that were added, changed or removed.
    """
    if manifest.data is None or data is None:
        return []
    found = differences(data, manifest.data)
    shown = found[:SHOWN] + ([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])
    if found and changed != "accept":
        raise ConfigError(
            f"{folder}: written with other images: {'; '.join(shown)}; to continue with those that are there now, pass "
            "data.changed=accept"
        )
    return shown


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys: ``{"a": {"b": 1}} -> {"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

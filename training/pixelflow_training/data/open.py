"""Opens the images that a recipe names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pixelflow_engine.errors import ConfigError
from pixelflow_training.config import TrainConfig

from .digits import load_digits
from .folder import FolderSource
from .prepared import PreparedImages
from .shards import ShardSource
from .source import ImageSource, TrainingImages, split


def open_data(config: TrainConfig, source: ImageSource | None = None) -> tuple[TrainingImages, TrainingImages]:
    """Open the data set of a recipe, split into the images to train on and the held-out images.

    Args:
        config: the recipe.
        source: a source of your own, used instead of the one that ``data.name`` and ``data.path`` name.

    Returns:
        the images to train on, and the held-out ones.

    Raises:
        ConfigError: ``data.path`` is missing, or its contents do not suit the model.
        ValueError: ``data.held_out`` leaves one of the parts empty, or labels have the wrong type, shape or range.
        OSError: a folder or file cannot be read.
        ImportError: ``data.name`` is ``digits`` and scikit-learn is not installed.
    """
    data, model = config.data, config.model
    if source is None and data.name == "digits":
        digits = load_digits(data, config.resolution, model.in_channels)
        _check_labels(torch.cat([part.labels for part in digits]), model.num_classes)
        return digits
    if source is None:
        if data.path is None:
            raise ConfigError(f"data.path: missing, expected where the images of data.name={data.name} are")
        kind = FolderSource if data.name == "folder" else ShardSource
        source = kind(Path(data.path), model.num_classes, model.in_channels, data.max_pixels)
    _check_labels(source.labels, model.num_classes)
    _check_classes(getattr(source, "classes", None), model.num_classes)
    kept, held_out = split(len(source.labels), data)
    return PreparedImages(source, kept, config), PreparedImages(source, held_out, config)


def _check_labels(labels: object, num_classes: int) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: got {type(labels).__name__}, expected a tensor, torch.int64 [N]")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise ValueError(f"labels: got {labels.dtype} {list(labels.shape)}, expected torch.int64 [N]")
    if num_classes and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels: got {int(labels.min())} to {int(labels.max())}, expected 0 to {num_classes - 1}: "
            f"model.num_classes is {num_classes}"
        )


def _check_classes(classes: object, num_classes: int) -> None:
    if classes is None:
        return
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes: got {classes!r}, expected a list or tuple of names")
    if num_classes and len(classes) != num_classes:
        raise ValueError(f"classes: got {len(classes)} names, expected {num_classes}: model.num_classes")

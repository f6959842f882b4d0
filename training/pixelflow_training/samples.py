"""Sample sheets: images sampled from the averaged model, to monitor a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.checkpoint import Checkpoint
from pixelflow_engine.image_files import save_png
from pixelflow_engine.output import to_uint8
from pixelflow_engine.pictures import contact_sheet

from .config import TrainConfig
from .evaluation import averaged_weights
from .ranks import Ranks
from .run import RunDirectory
from .state import TrainState

COLUMNS = 10
"""Most columns of a sheet whose labels the recipe does not name."""
SMALLEST = 64
"""Smallest size in pixels of an image on a sheet; smaller images are enlarged."""


def save_samples(run: RunDirectory, state: TrainState, config: TrainConfig, ranks: Ranks) -> dict[str, object]:
    """Sample the recipe's sheet on rank 0 and write it; all ranks must call it.

    Returns:
        fields for the log: ``file``, the path relative to the run directory, and ``failed``, the number of images that
            are not finite; or ``reason``, why there is no sheet: a lack of GPU memory beside the training does not end
            the run.
    """
    weights = averaged_weights(state, ranks)

    def draw() -> dict[str, object]:
        try:
            picture, failed = sample_sheet(config, weights, ranks.device)
        except torch.OutOfMemoryError as error:
            return {"reason": str(error)}
        path = run.sample_path(state.step)
        save_png(picture, path)
        return {"file": str(path.relative_to(run.path)), "failed": failed}

    return ranks.first_does(draw)


def sample_sheet(config: TrainConfig, weights: Mapping[str, Tensor], device: torch.device) -> tuple[Image.Image, int]:
    """Sample a sheet with one label per column, one row at a time.

    Every image has its own seed, which does not depend on the step; torch's generators are left unchanged. Images are
    computed by the recipe's backend in the recipe's type, without compilation or graphs.

    Args:
        config: the recipe.
        weights: under the published names; not modified.
        device: where to sample.

    Returns:
        the sheet, and the number of its images that are not finite.
    """
    wanted, compute = config.samples, config.compute
    checkpoint = Checkpoint(config.network, dict(weights), "the averaged model")
    dtype = getattr(torch, compute.dtype)
    engine = PixelFlowEngine.from_checkpoint(checkpoint, device, dtype, compute.backend, graphs=False)
    labels = columns_of(config)
    columns = COLUMNS if labels is None else len(labels)
    rows, failed = [], 0
    for row in range(wanted.rows):
        first = wanted.seed + row * columns
        sampled = engine(
            labels,
            num_inference_steps=wanted.steps[0] if len(wanted.steps) == 1 else wanted.steps,
            guidance_scale=1.0 if labels is None else wanted.guidance_scale,
            seed=list(range(first, first + columns)),
            output_type="np",
            on_failure="report",
        )
        rows.append(to_uint8(np.asarray(sampled.images)))
        failed += sum(status != "ok" for status in sampled.statuses)
    return contact_sheet(np.concatenate(rows), columns, zoom=math.ceil(SMALLEST / config.resolution)), failed


def columns_of(config: TrainConfig) -> list[int] | None:
    """Return the label of each column; None for a model without classes."""
    classes = config.model.num_classes
    if config.samples.labels is not None:
        return list(config.samples.labels)
    return [place * classes // min(COLUMNS, classes) for place in range(min(COLUMNS, classes))] if classes else None

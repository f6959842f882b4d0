"""Pictures of what the averaged model samples, to see a run learn."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.checkpoint import Checkpoint
from pixelflow_engine.output import to_uint8
from pixelflow_engine.pictures import contact_sheet, save_png

from .config import TrainConfig
from .evaluation import averaged_weights
from .ranks import Ranks
from .run import RunDirectory
from .state import TrainState

COLUMNS = 10
"""Where the recipe names no labels."""
SMALLEST = 64
"""Pixels that an image of the picture has at least."""


def save_samples(run: RunDirectory, state: TrainState, config: TrainConfig, ranks: Ranks) -> dict[str, object]:
    """Sample the recipe's picture on the first rank and write it; all ranks take part.

    Returns:
        for the log: ``file``, its path inside the run directory, and how many of its images ``failed``; or the
        ``reason`` why there is none: a picture that finds no memory beside the training does not end it.
    """
    weights = averaged_weights(state, ranks)

    def draw() -> dict[str, object]:
        try:
            picture, failed = sample_sheet(config, weights, ranks.device)
        except torch.OutOfMemoryError as error:
            return {"reason": str(error)}
        path = run.sample_path(state.step)
        path.parent.mkdir(exist_ok=True)
        save_png(picture, path)
        return {"file": str(path.relative_to(run.path)), "failed": failed}

    return ranks.first_does(draw)


def sample_sheet(config: TrainConfig, weights: Mapping[str, Tensor], device: torch.device) -> tuple[Image.Image, int]:
    """Sample a picture, a label to a column and a row at a time.

    Every image has a seed of its own, which does not depend on when the picture is made; torch's generators are left
    as they are. Computed by the recipe's backend in its type, without compilation or graphs.

    Args:
        config: the recipe.
        weights: under the published names; not changed.
        device: where.

    Returns:
        the picture, and how many of its images are not finite.
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
    """The label of each column; None for a model without classes."""
    classes = config.model.num_classes
    if config.samples.labels is not None:
        return list(config.samples.labels)
    return [place * classes // min(COLUMNS, classes) for place in range(min(COLUMNS, classes))] if classes else None

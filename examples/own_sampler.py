"""A custom sampler over the engine's velocity field: Heun's second-order method, without guidance.

Usage::

    python examples/own_sampler.py heun.png
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.image_files import save_png
from pixelflow_engine.noise import CounterNoise, upsample_renoise
from pixelflow_engine.pictures import contact_sheet, pixels
from pixelflow_engine.schedule import make_stages, step_times

STEPS = 8


def sample(engine: PixelFlowEngine, labels: list[int], side: int) -> torch.Tensor:
    """Sample square images, one per label; the label is also the seed.

    These are the images of ``engine(labels, seed=labels, solver="heun", num_inference_steps=STEPS, guidance_scale=1)``.

    Args:
        engine: the engine.
        labels: class of each image.
        side: of the images, in pixels.

    Returns:
        ``[B, 3, side, side]`` in [-1, 1].
    """
    stages = make_stages(engine.config.scheduler)
    noise = CounterNoise(tuple(labels), engine.device)
    side //= 2 ** (len(stages) - 1)
    x = noise.initial((len(labels), 3, side, side))
    for stage in stages:
        if stage.index > 0:
            side *= 2
            block_noise = noise.block(stage.index, (len(labels), 3, side, side))
            x = upsample_renoise(x, block_noise, stage.alpha, stage.beta)
        # Where the steps begin and end: on the stage's own axis from 0 to 1, and as the model's time input.
        tau, t_model = step_times(stage, engine.config.scheduler, STEPS, shift=1.0)
        for (begin, end), (t, t_next) in zip(pairwise(tau.tolist()), pairwise(t_model.tolist()), strict=True):
            h = end - begin
            slope = engine.velocity(x, t, class_labels=labels)
            x = x + h / 2 * (slope + engine.velocity(x + h * slope, t_next, class_labels=labels))
    return x


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    digits = PixelFlowEngine.from_pretrained("digits")
    images = sample(digits, list(range(10)), digits.config.resolution)
    save_png(contact_sheet(pixels(images), columns=10, zoom=2), Path(sys.argv[1]))

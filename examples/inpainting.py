"""Inpainting: after every step the known pixels are restored, at the noise level of that time.

Usage::

    python examples/inpainting.py completed.png
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from pixelflow_engine import PixelFlowEngine, StepEvent
from pixelflow_engine.image_files import save_png
from pixelflow_engine.image_to_image import taken_up
from pixelflow_engine.noise import CounterNoise
from pixelflow_engine.pictures import contact_sheet, pixels
from pixelflow_engine.schedule import make_stages


def complete(
    engine: PixelFlowEngine, images: torch.Tensor, known: torch.Tensor, labels: list[int], seed: int = 0
) -> torch.Tensor:
    """Complete images whose pixels are known where ``known`` is true.

    Args:
        engine: the engine.
        images: ``[B, c, H, W]`` in [0, 1].
        known: ``[H, W]`` bool.
        labels: class of each image.
        seed: seed of the first image.

    Returns:
        ``[B, c, H, W]`` in [0, 1], equal to ``images`` where ``known`` is true.
    """
    stages = make_stages(engine.config.scheduler)
    signed = images * 2 - 1
    noise = CounterNoise(tuple(range(1000, 1000 + len(labels))), engine.device)

    def put_back(event: StepEvent) -> torch.Tensor:
        """Replace the known part of the state by what training would show the model at this stage and time."""
        latents = event.latents
        assert isinstance(latents, torch.Tensor)
        eps = noise.initial((len(labels), *latents.shape[1:]))
        there = taken_up(signed, eps, stages[event.stage], len(stages), event.tau)
        mask = F.interpolate(known[None, None].float(), size=latents.shape[2:], mode="area") == 1
        return torch.where(mask, there.to(latents), latents)

    out = engine(labels, num_inference_steps=20, seed=seed, output_type="pt", callback_on_step_end=put_back).images
    assert isinstance(out, torch.Tensor)
    return torch.where(known, images, out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    digits = PixelFlowEngine.from_pretrained("digits")
    labels = list(range(10))
    whole = digits(labels, seed=7, output_type="pt").images
    assert isinstance(whole, torch.Tensor)
    upper = torch.zeros(whole.shape[2:], dtype=torch.bool)
    upper[: whole.shape[2] // 2] = True
    rows = [whole, torch.where(upper, whole, 0.5), *(complete(digits, whole, upper, labels, seed) for seed in (0, 100))]
    save_png(contact_sheet(pixels(torch.cat(rows) * 2 - 1), columns=10, zoom=2), Path(sys.argv[1]))

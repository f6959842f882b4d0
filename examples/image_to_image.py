"""Image to image: how much of a given image is kept, by stage and strength.

Usage::

    python examples/image_to_image.py kept.png

The first row of the picture is given, the others are made from it with other noise, from the most that is kept to the
least; the last one is made without it.
"""

import sys
from pathlib import Path

import torch

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.image_files import save_png
from pixelflow_engine.pictures import contact_sheet, pixels

BEGINNINGS = [(2, 0.3), (2, 1.0), (1, 0.5), (1, 1.0), (0, 0.5)]
"""Stage and strength of each row."""


def variations(engine: PixelFlowEngine, images: torch.Tensor, labels: list[int], seed: int) -> list[torch.Tensor]:
    """Variations of images ``[B, c, H, W]`` in [0, 1], one batch for each beginning, and one without the images."""
    rows = []
    for stage, strength in BEGINNINGS:
        rows.append(
            engine(labels, image=images, start_stage=stage, strength=strength, seed=seed, output_type="pt").images
        )
    return [*rows, engine(labels, seed=seed, output_type="pt").images]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    digits = PixelFlowEngine.from_pretrained("digits")
    labels = list(range(10))
    given = digits(labels, seed=7, output_type="pt").images
    made = variations(digits, given, labels, seed=100)
    for name, row in zip(
        [*(f"stage {s}, strength {w}" for s, w in BEGINNINGS), "without the image"], made, strict=True
    ):
        print(f"{name:24} mean difference from the given images {(row - given).abs().mean():.3f}")
    save_png(contact_sheet(pixels(torch.cat([given, *made]) * 2 - 1), columns=10, zoom=2), Path(sys.argv[1]))

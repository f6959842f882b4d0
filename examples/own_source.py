"""Training on a source of your own: squares and discs that are drawn when they are asked for.

Usage::

    python examples/own_source.py runs/shapes [key=value ...]

Run again, it goes on where it was stopped. Then::

    pixelflow generate --model runs/shapes --class-label 0 --class-label 1 --images-per-label 8 --output shapes.png
"""

import sys

import torch

from pixelflow_training import load_config, train

SIZE = 32
RECIPE = ["model.num_classes=2", "model.in_channels=1", "model.out_channels=1", f"resolution={SIZE}", "steps=300"]


class Shapes:
    """Images by number: even ones are squares (label 0), odd ones discs (label 1), each of its own place and size."""

    classes = ("square", "disc")

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count) % 2

    def name(self, sample: int) -> str:
        """A name by which messages and the log speak of an image."""
        return f"{self.classes[sample % 2]} {sample}"

    def load(self, sample: int) -> torch.Tensor:
        """Return an image ``[1, H, W]`` uint8, the same on every call; training resizes and crops."""
        draws = torch.rand(3, generator=torch.Generator().manual_seed(sample))
        radius = SIZE * (0.15 + 0.2 * draws[0])
        row, column = radius + (SIZE - 2 * radius) * draws[1:]
        down, across = (torch.arange(SIZE) - row).abs()[:, None], (torch.arange(SIZE) - column).abs()
        distance = torch.hypot(down, across) if sample % 2 else torch.maximum(down, across)
        return (255 * (radius - distance + 0.5).clamp(0, 1)).to(torch.uint8)[None]

    def listing(self) -> dict[str, str]:
        """What a resumed run compares, so that it does not go on with other images."""
        return {"shapes": f"{len(self.labels)} of {SIZE} px"}


# With data.workers above 0 each worker imports this file, which must then not train.
if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    config = load_config("digits-two-minutes", [*RECIPE, "data.held_out=64", *sys.argv[2:]])
    print(f"wrote {train(config, sys.argv[1], source=Shapes(2048))}")

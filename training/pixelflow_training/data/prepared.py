"""Images of a source as training takes them: prepared, and one that cannot be read replaced by the next that can."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import Plan

from .crop import prepare
from .listing import Listing, listing_of
from .source import ImageSource, SkippedImage, Taken, UnreadableImageError


class PreparedImages:
    """Some images of a source, resized and cropped.

    An image that cannot be read is replaced, pixels and label, by the next one that can be, in the order of ``samples``
    and from its end on to its beginning. So what a plan gets is a pure function of the plan and the files.

    Args:
        source: where they come from.
        samples: ``[N]`` int64, which ones.
        config: the recipe.
    """

    def __init__(self, source: ImageSource, samples: Tensor, config: TrainConfig) -> None:
        self.source = source
        self.samples = samples
        self.data = config.data
        self.shape = config.model.in_channels, config.resolution, config.resolution

    def __len__(self) -> int:
        return self.samples.shape[0]

    def listing(self) -> Listing:
        """What files the source has, used or not: which ones are used depends on all of them."""
        return listing_of(self.source)

    def name(self, sample: int) -> str:
        """That of the source."""
        return self.source.name(int(self.samples[sample]))

    def take(self, plan: Plan) -> Taken:
        """The images of a plan. Where more are skipped than ``data.max_skipped`` allows, the rest of them is black.

        Raises:
            ValueError: the source gave something else than it should, or no image at all can be read.
        """
        images = torch.zeros(len(plan), *self.shape, dtype=torch.uint8)
        labels = torch.zeros(len(plan), dtype=torch.int64)
        skipped: dict[int, SkippedImage] = {}
        for i, (sample, (across, down)) in enumerate(zip(plan.sample.tolist(), plan.crop.tolist(), strict=True)):
            while len(skipped) <= self.data.max_skipped:
                number = int(self.samples[sample])
                if number not in skipped:
                    try:
                        images[i] = self._load(number, (across, down))
                        labels[i] = self.source.labels[number]
                        break
                    except UnreadableImageError as error:
                        skipped[number] = SkippedImage(self.source.name(number), str(error))
                if len(skipped) == len(self):
                    raise ValueError(f"data: none of {len(self)} images can be read; the last: {skipped[number]}")
                sample = (sample + 1) % len(self)
        return Taken(images, labels, tuple(skipped.values()))

    def _load(self, number: int, place: tuple[float, float]) -> Tensor:
        channels, resolution, _ = self.shape
        image = self.source.load(number)
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != channels or not image.numel():
            raise ValueError(
                f"image {self.source.name(number)}: got {image.dtype} {list(image.shape)}, "
                f"expected torch.uint8 [{channels}, H, W]"
            )
        return prepare(image, resolution, self.data.crop, place, self.data.max_pixels)

"""Images of a source, resized and cropped for training, with unreadable images replaced by readable ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import Plan

from .crop import prepare
from .listing import Listing, listing_of
from .source import ImageSource, SkippedImage, Taken, UnreadableImageError


class PreparedImages:
    """A subset of a source's images, resized and cropped.

    An image that cannot be read is replaced, pixels and label, by the next readable one in the order of ``samples``,
    which wraps around at its end. What a plan gets is therefore a pure function of the plan and the files.

    Args:
        source: the source of the images.
        samples: ``[N]`` int64, indices into the source.
        config: the recipe.
    """

    def __init__(self, source: ImageSource, samples: Tensor, config: TrainConfig) -> None:
        self.source = source
        self.samples = samples
        self.data = config.data
        self.shape = config.model.in_channels, config.resolution, config.resolution

    def __len__(self) -> int:
        return self.samples.shape[0]

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the source's classes, if it knows them."""
        return getattr(self.source, "classes", None)

    def listing(self) -> Listing:
        """Listing of the whole source, held-out images included: which images are used depends on all of them."""
        return listing_of(self.source)

    def name(self, sample: int) -> str:
        """Name of a sample in the source."""
        return self.source.name(int(self.samples[sample]))

    def take(self, plan: Plan) -> Taken:
        """Load the images of a plan.

        Once more than ``data.max_skipped`` images have been skipped, the remaining images are left black.

        Raises:
            ValueError: the source returned an image of the wrong type or shape, or none of the images can be read.
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
                    name, reason = skipped[number]
                    raise ValueError(f"data: none of {len(self)} images can be read; the last is {name}: {reason}")
                sample = (sample + 1) % len(self)
        return Taken(images, labels, tuple(skipped.values()))

    def _load(self, number: int, place: tuple[float, float]) -> Tensor:
        channels, resolution, _ = self.shape
        try:
            image = self.source.load(number)
        except UnreadableImageError:
            raise
        except Exception as error:
            error.add_note(f"while image {self.source.name(number)} was loaded")
            raise
        if not isinstance(image, Tensor):
            raise ValueError(
                f"image {self.source.name(number)}: got {type(image).__name__}, "
                f"expected a tensor, torch.uint8 [{channels}, H, W]"
            )
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != channels or not image.numel():
            raise ValueError(
                f"image {self.source.name(number)}: got {image.dtype} {list(image.shape)}, "
                f"expected torch.uint8 [{channels}, H, W]"
            )
        return prepare(image, resolution, self.data.crop, place, self.data.max_pixels)

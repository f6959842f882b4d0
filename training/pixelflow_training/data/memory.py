"""Images in memory, of the model's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pixelflow_training.plan import Plan

from .listing import Listing, describe_labels
from .source import Taken


@dataclass(frozen=True, eq=False, slots=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: ``[N, c, R, R]`` uint8.
        labels: ``[N]`` int64.
        names: of the images; by default their numbers.
        title: name of the set.
        classes: names of the classes in the order of the labels, if they have names.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str] = ()
    title: str = "images in memory"
    classes: Sequence[str] | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def listing(self) -> Listing:
        """Return the set's title and a digest of its labels."""
        return {self.title: describe_labels(self.labels)}

    def name(self, sample: int) -> str:
        """Return the given name of a sample, or its number."""
        return self.names[sample] if self.names else str(sample)

    def take(self, plan: Plan) -> Taken:
        """Return the images of a plan."""
        return Taken(self.images[plan.sample], self.labels[plan.sample])

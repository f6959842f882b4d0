"""A stage of the cascade as a problem to run, and what a run of it is.

All who run it have the same weights, the same start and the same labels, so that their states can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pixelflow_engine import PixelFlowConfig, flops
from pixelflow_engine.guidance import stagewise_weights

REFERENCE = "reference"
"""The opponent that the others are checked against."""

GUIDANCE = 2.4
ATTEMPTS = 4
"""Of Dopri5, after which a run ends wherever it is: with random weights it could need any number."""

StageSolver = Literal["euler", "dopri5"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProblem:
    """What is run.

    Attributes:
        config: of the model.
        stage: of the cascade.
        batch: images; with guidance the model sees twice as many.
        steps: Euler's.
        solver: ``euler`` or ``dopri5``.
        dtype: of the matrix products.
        device: where.
    """

    config: PixelFlowConfig
    stage: int
    batch: int
    steps: int
    solver: StageSolver
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the state."""
        side = self.config.resolution >> (self.config.scheduler.num_stages - 1 - self.stage)
        return self.batch, self.config.model.in_channels, side, side

    @property
    def tokens(self) -> int:
        """Of one image."""
        return (self.shape[3] // self.config.model.patch_size) ** 2

    @property
    def weight(self) -> float:
        """Of the guidance; 1 has no null half."""
        return stagewise_weights(GUIDANCE, self.config.scheduler.num_stages)[self.stage]

    @property
    def sequences(self) -> int:
        """What the model sees."""
        return self.batch if self.weight == 1 else 2 * self.batch

    @property
    def flops(self) -> int:
        """Of the matrix products and the attention of an evaluation; a multiplication and an addition are two.

        Of a model without text. Left out are the products with a row per image, not per token: the embeddings of time
        and size, and the modulations that are made of them (of every block, and before the last product).
        """
        return self.product_flops + self.attention_flops

    @property
    def product_flops(self) -> int:
        """Of the blocks' products, the embedding of patches and the head."""
        model = self.config.model
        return self.sequences * self.tokens * (flops.token_products(model) + flops.patch_products(model))

    @property
    def attention_flops(self) -> int:
        """Of queries with keys and of weights with values."""
        return flops.count(self.config.model, [self.tokens] * self.sequences).attention

    @property
    def pointwise_bytes(self) -> int:
        """What an evaluation moves beside them: three fused passes a block, that read and write 12 values a channel.

        Left out are weights, rows per image, places of tokens, and what is not in a block.
        """
        model = self.config.model
        return 12 * self.dtype.itemsize * self.sequences * self.tokens * model.width * model.depth

    def start(self) -> Tensor:
        """The state at the stage's entry, ``[B, c, h, w]`` float32."""
        generator = torch.Generator(self.device).manual_seed(1000 * self.stage + self.batch)
        return torch.randn(self.shape, generator=generator, device=self.device)

    def labels(self) -> Tensor:
        """Class labels ``[B]``."""
        return torch.arange(self.batch, device=self.device) * 7 % self.config.model.num_classes


@dataclass(frozen=True, eq=False, slots=True)
class Ran:
    """What a run did.

    Attributes:
        first: the state after its first Euler step, where it was asked for.
        end: the state at its end.
        steps: steps, or attempts.
        evaluations: of the model.
    """

    first: Tensor | None
    end: Tensor
    steps: int
    evaluations: int


@dataclass(frozen=True, eq=False, slots=True)
class Attempt:
    """The first attempt of Dopri5, of the batch's last image.

    Attributes:
        state: that it arrives at, ``[1, c, h, w]``; the start where it was rejected.
        reached: the place within the stage, which is the step's length; 0 where it was rejected.
    """

    state: Tensor
    reached: float


class StageRun(Protocol):
    """A stage, ready to be run any number of times from its start."""

    def run(self, keep_first: bool = False) -> Ran:
        """Run it; on a GPU this may return before the work is done."""
        ...

    def attempt(self) -> Attempt | None:
        """Set out anew and make the first attempt of Dopri5; None where its length is not told."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...

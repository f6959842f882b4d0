"""``backend="torch"`` in float32 trains as the reference does in a plain loop, to the last bit where packs allow it.

What has the same bits, on one machine with the same versions:

- where a pack's images have one size: velocities, gradients and their norm, weights, moments and averages, after any
  number of steps. A pack is then the reference's batch, product by product.
- the loss as a number only where it is summed up alike: the packed one is summed in float64 over an image's tokens, the
  reference's in float32 over its pixels. Both have the same gradient to the last bit.

In a pack of several sizes products have other numbers of rows than the reference's, image by image or size by size,
and round otherwise: level D of :mod:`test_packed_step` holds for a step, and a few steps stay as near to float64 as
the reference does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.operations import Operations
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_engine.reference import training as reference_training
from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import load_digits
from support.kernels import assert_level_d, assert_same_bits
from support.recipes import tiny_recipe
from support.reference_models import random_reference
from support.runs import state_of
from support.training_packs import (
    TrainingPack,
    by_operations,
    draw_pack,
    image_of,
    losses_of,
    packed_model,
    reference_losses,
)

Losses = Callable[[], Tensor]


class PlainLoop:
    """AdamW on clipped gradients, and an average of the weights: torch's own, and nothing of ours.

    Args:
        model: what is trained.
        lr, weight_decay: AdamW's.
        max_norm: gradients are clipped to it.
        decay: of the average; it rises as ``(1 + step) / (10 + step)``.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, max_norm: float, decay: float) -> None:
        self.model, self.max_norm, self.decay, self.steps = model, max_norm, decay, 0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        self.average = [p.detach().clone() for p in model.parameters()]

    def step(self, lr: float, losses: Losses) -> tuple[float, float]:
        """Loss and norm of the gradient."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss = losses().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        kept = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, parameter in zip(self.average, self.model.parameters(), strict=True):
                average.lerp_(parameter, 1 - kept)
        self.steps += 1
        return loss.item(), norm.item()


def as_pack(batch: Batch) -> TrainingPack:
    return TrainingPack(batch.layout.grids, batch.tokens, batch.targets, batch.t_model, batch.labels, None)


def reference_of(config: TrainConfig, model: PackedTransformer) -> PixelFlowTransformer:
    shape = config.model
    twin = random_reference(
        0,
        heads=shape.num_attention_heads,
        head_dim=shape.attention_head_dim,
        depth=shape.depth,
        patch_size=shape.patch_size,
        num_classes=shape.num_classes,
        channels=shape.in_channels,
        dtype=torch.float32,
    )
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.requires_grad_(True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_hundred_steps_of_one_size_have_the_references_bits(seed: int, tmp_path: Path) -> None:
    """``pixelflow train`` itself, through its checkpoint."""
    config = tiny_recipe(
        tmp_path, "scheduler.num_stages=1", "resolution=8", "model.depth=2", "model.patch_size=2", "steps=200",
        "batch_size=3", f"seed={seed}", "eval_every=200", "optimizer.max_grad_norm=1.5", "optimizer.weight_decay=0.01",
        "ema_decay=0.99",
    )  # fmt: skip
    loop.train(config, tmp_path / "run", quiet=True)
    data, _ = load_digits(config.data, config.resolution, config.model.in_channels)
    reference = reference_of(config, loop.build_model(config))
    settings = config.optimizer
    plain = PlainLoop(reference, settings.lr, settings.weight_decay, settings.max_grad_norm, config.ema_decay)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    trained = [(line["loss"], line["grad_norm"]) for line in log if line["event"] == "train"]
    assert len(trained) == config.steps
    clipped = 0
    for step, found in enumerate(trained):
        batch = loop.training_batch(config, data, step)

        def losses(batch: Batch = batch) -> Tensor:
            pack = as_pack(batch)
            images, targets = (
                torch.cat([image_of(tokens, pack, i, config.model.patch_size) for i in range(config.batch_size)])
                for tokens in (pack.tokens, pack.targets)
            )
            velocities = reference(images, batch.t_model, batch.labels)
            loss = reference_training.loss(list(velocities), list(targets))
            return loss[None]

        loss, norm = plain.step(loop.learning_rate(settings, step, config.steps), losses)
        # Positive terms: each of their sums is off by as many roundings as it has terms, in the worst order.
        assert found[0] == pytest.approx(loss, rel=(8 * 8 + 8) * 2.0**-23), step
        assert found[1] == norm, step
        clipped += norm > settings.max_grad_norm
    assert 0 < clipped < config.steps, "some steps should be clipped and some not"
    state = state_of(tmp_path / "run", config)
    averages = [*zip(state.ema.model.parameters(), plain.average, strict=True)]
    pairs = zip(reference.named_parameters(), state.model.parameters(), averages, strict=True)
    for (name, theirs), ours, average in pairs:
        assert_same_bits(ours, theirs, name)
        assert_same_bits(*average, f"average of {name}")
        for moment in ("exp_avg", "exp_avg_sq"):
            assert_same_bits(
                state.optimizer.state[ours][moment], plain.optimizer.state[theirs][moment], f"{moment} of {name}"
            )


STEPS = 3
MIXED = [(2, 2), (1, 1), (1, 1)]


@by_operations
def test_steps_of_mixed_packs_stay_as_near_to_float64_as_the_reference(operations: Operations) -> None:
    """A step's loss tells of all steps before it. The published rate, and another pack for each step."""
    packs = [draw_pack(random_reference(70, depth=1), MIXED, 71 + step) for step in range(STEPS)]

    def curve(model: nn.Module, losses_of_pack: Callable[[TrainingPack], Tensor]) -> Tensor:
        plain = PlainLoop(model, 1e-4, 0.0, 1.0, 0.9999)
        return torch.tensor([plain.step(1e-4, lambda pack=pack: losses_of_pack(pack))[0] for pack in packs]).double()

    packed = packed_model(random_reference(70, depth=1), operations, torch.float32)
    found = curve(packed, lambda pack: losses_of(packed, pack))
    twins = [
        random_reference(70, depth=1, dtype=dtype).requires_grad_(True) for dtype in (torch.float32, torch.float64)
    ]
    plain, truth = (curve(twin, lambda pack, twin=twin: reference_losses(twin, pack)) for twin in twins)
    assert_level_d(found, plain, truth, "losses")
    assert truth[0] != truth[-1]

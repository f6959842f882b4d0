"""Batches and losses on a device: the pack that a CPU makes, to the last bit, and losses that repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelflow_training.collate import make_batch
from pixelflow_training.data import Loader, open_data
from pixelflow_training.loop import training_batch
from pixelflow_training.loss import image_losses
from pixelflow_training.plan import plan_step
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep
from support.recipes import tiny_recipe
from support.reference_models import seeded
from support.steps import random_state

pytestmark = pytest.mark.gpu


def test_a_batch_of_a_device_is_that_of_a_cpu(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "batch_size=24", "data.augment.flip=true", "label_drop=0.3")
    plan = plan_step(config, 3, 100)
    images = torch.randint(0, 256, (24, 1, 16, 16), generator=seeded(1), dtype=torch.uint8)
    labels = torch.arange(24) % 10
    here = make_batch(images, labels, plan, config.network)
    there = make_batch(images.cuda(), labels.cuda(), plan, config.network)
    for name in ("tokens", "targets", "t_model", "labels", "latent_size"):
        assert getattr(there, name).is_cuda, name
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), name
    assert torch.equal(there.stage, here.stage), "which stays on the CPU"


def test_nothing_waits_until_a_step_is_finished(tmp_path: Path) -> None:
    """Images to the device, batch, and all launches of a step: so the next batch is made while the device computes."""
    config = tiny_recipe(tmp_path, "compute.device=cuda", "data.augment.rotate=10")
    data, _ = open_data(config)
    step = TrainStep(TrainState(config, random_state(config).model.cuda()), config)
    with Loader(data, config, 0, device="cuda") as loader:
        assert step(training_batch(config, loader, 0), 1e-3).finite  # compiles, and makes what is made once
        batch = training_batch(config, loader, 1)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            begun = step.begin(batch, 1e-3)
            training_batch(config, loader, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert step.finish(begun).finite


def test_losses_repeat_and_are_near_float64(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "batch_size=64")
    images = torch.rand(64, 1, 16, 16, generator=seeded(2)) * 2 - 1
    labels = torch.zeros(64, dtype=torch.int64)
    batch = make_batch(images.cuda(), labels.cuda(), plan_step(config, 0, 64), config.network)
    exact = image_losses(torch.zeros_like(batch.targets).double(), batch.targets.double(), batch.layout)
    runs = []
    for _ in range(5):
        velocities = torch.zeros_like(batch.targets).requires_grad_()
        losses = image_losses(velocities, batch.targets, batch.layout)
        losses.sum().backward()
        assert velocities.grad is not None
        runs.append((losses.detach(), velocities.grad))
    # 16 channels: a rounding of each square and each sum, of the mean and of the result; all terms are positive.
    assert ((runs[0][0].double() - exact).abs() <= 20 * 2.0**-24 * exact).all()
    for losses, gradient in runs[1:]:
        assert torch.equal(losses, runs[0][0])
        assert torch.equal(gradient, runs[0][1])

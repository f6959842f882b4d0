"""Loss curves of the packed training step on each backend, compared with the reference trained image by image.

With one seed all of them start from the same weights and see the same batches, in float32; only the implementation
differs: the packed model takes the steps of ``pixelflow train``, with the backend's own clipping, AdamW and averages.
Another seed draws other weights, orders, times and noise: the difference between seeds is the yardstick.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_benchmarks.opponents.random_models import random_reference
from pixelflow_benchmarks.suites.training.checks import images_of
from pixelflow_engine.backends import choose
from pixelflow_engine.config import ModelConfig, SchedulerConfig
from pixelflow_engine.errors import BackendUnavailableError
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_engine.reference import training as reference_training
from pixelflow_training.collate import Batch
from pixelflow_training.config import ComputeConfig, DataConfig, OptimizerConfig, TrainConfig
from pixelflow_training.data import ImageSet, load_digits
from pixelflow_training.loop import build_model, learning_rate, training_batch
from pixelflow_training.ranks import ALONE
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep

REFERENCE = "reference"
WINDOWS = 10
"""Number of windows over which a curve is averaged: a single step's loss is that of a few images at random times."""


def recipe(steps: int, seed: int) -> TrainConfig:
    """Return a recipe small enough for Triton's interpreter: 8-pixel digits in two stages, of 4 tokens and of 1."""
    return TrainConfig(
        model=ModelConfig(
            num_attention_heads=2, attention_head_dim=24, depth=1, in_channels=1, out_channels=1, num_classes=10
        ),
        scheduler=SchedulerConfig(num_stages=2),
        resolution=8,
        data=DataConfig(held_out=360),
        optimizer=OptimizerConfig(lr=3e-3, warmup_steps=max(steps // 20, 1)),
        steps=steps,
        batch_size=4,
        seed=seed,
    )


def measure_curves(backends: Sequence[str], seeds: int, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Train the reference and every backend with every seed.

    Args:
        backends: backends of the packed model.
        seeds: number of seeds, counted from 0.
        steps: training steps, a multiple of ``WINDOWS``.
        device: device to run on.

    Yields:
        ``curve`` records with a variant's ``loss`` at every step. ``agreement`` records that compare a backend's curve
        with the reference's of the same seed: the largest ``difference`` between window means, the largest difference
        at a single ``step``, and ``spread``, the difference between the reference's seeds in the window where it is
        smallest. A curve whose difference exceeds the spread is wrong: its record has a ``fault`` instead of these
        figures. ``absent`` records for backends that cannot run.

    Raises:
        ValueError: ``steps`` is not a multiple of ``WINDOWS``.
    """
    if steps < WINDOWS or steps % WINDOWS:
        raise ValueError(f"steps: got {steps}, expected a multiple of {WINDOWS}")
    expected = {}
    for seed in range(seeds):
        config = recipe(steps, seed)
        weights = build_model(config).state_dict()
        reference = random_reference(config.network, weights, torch.float32).requires_grad_(True).to(device)
        expected[seed] = _train_reference(config, reference, device)
        yield {"kind": "curve", "variant": REFERENCE, "seed": seed, "loss": expected[seed]}
    spread = spread_of(list(expected.values()))
    for name in backends:
        try:
            backend = choose(name, device, torch.float32, recipe(steps, 0).model.attention_head_dim)
        except BackendUnavailableError as error:
            yield {"kind": "absent", "variant": name, "reason": str(error)}
            continue
        for seed in range(seeds):
            config = recipe(steps, seed)
            losses = _train_packed(replace(config, compute=ComputeConfig(backend=backend.name)), device)
            yield {"kind": "curve", "variant": name, "seed": seed, "loss": losses}
            yield agreement(name, seed, losses, expected[seed], spread)


def reference_losses(model: PixelFlowTransformer, batch: Batch) -> Tensor:
    """Compute the loss of each image ``[n]``, one image at a time."""
    losses = []
    pixels = [images_of(tokens, batch, model.patch_size) for tokens in (batch.tokens, batch.targets)]
    for i, (x, target) in enumerate(zip(*pixels, strict=True)):
        label = None if batch.labels is None else batch.labels[i : i + 1]
        losses.append(reference_training.loss([model(x, batch.t_model[i : i + 1], label)], [target]))
    return torch.stack(losses)


def windows(losses: Sequence[float]) -> Tensor:
    """Return the means over equal parts of a curve, ``[WINDOWS]`` float64."""
    return torch.tensor(losses, dtype=torch.float64).unflatten(0, (WINDOWS, -1)).mean(1)


def spread_of(curves: Sequence[Sequence[float]]) -> float:
    """Return the difference between the highest and the lowest curve in the window where it is smallest."""
    means = torch.stack([windows(curve) for curve in curves])
    return (means.amax(0) - means.amin(0)).min().item()


def agreement(
    variant: str, seed: int, losses: Sequence[float], expected: Sequence[float], spread: float
) -> dict[str, Any]:
    """Return the record that compares a curve with the reference's of the same seed; beyond ``spread`` it is wrong."""
    difference = (windows(losses) - windows(expected)).abs().max().item()
    step = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    record = {"kind": "agreement", "case": f"seed {seed}", "variant": variant, "right": difference <= spread}
    found = {"difference": difference, "step": step, "spread": spread}
    return record | (found if record["right"] else {"fault": f"differs by {difference:.3g}, seeds by {spread:.3g}"})


def curves_table(run: Run) -> TextTable:
    """A row per curve: its first and last window, and its distance from the reference's curve of the same seed."""
    agreements = {(r["variant"], r["case"]): r for r in run.of_kind("agreement")}
    rows = []
    for record in run.of_kind("curve"):
        means = windows(record["loss"])
        found = agreements.get((record["variant"], f"seed {record['seed']}"))
        own = ("", "")
        if found is not None:
            own = (f"{found['difference']:.1e}", f"{found['step']:.1e}") if found["right"] else (found["fault"], "")
        rows.append((record["variant"], str(record["seed"]), f"{means[0]:.4f}", f"{means[-1]:.4f}", *own))
    head = run.environment
    reference = [record["loss"] for record in run.of_kind("curve") if record["variant"] == REFERENCE]
    where = head.get("gpu", head.get("processor", head["machine"]))
    title = (
        f"{head['steps']} steps of {head['batch']} digits, float32; {where}, torch {head['torch']}. Means over a "
        f"{WINDOWS}th of the steps; the reference's seeds are nowhere nearer together than {spread_of(reference):.1e}."
    )
    header = ("who trains", "seed", "first loss", "last loss", "furthest from the reference", "at a single step")
    return TextTable(title, header, tuple(rows))


def _train_reference(config: TrainConfig, model: PixelFlowTransformer, device: torch.device) -> list[float]:
    """Train in a plain loop with PyTorch's AdamW and return the loss of every step."""
    data = _digits(config)
    settings, losses = config.optimizer, []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay, fused=True)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, config.steps)
        loss = reference_losses(model, training_batch(config, data, step).to(device)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _train_packed(config: TrainConfig, device: torch.device) -> list[float]:
    """Train as ``pixelflow train`` does and return the loss of every step."""
    data, ranks = _digits(config), replace(ALONE, device=device)
    step = TrainStep(TrainState(config, build_model(config).to(device), ranks), config, ranks)
    return [
        step(
            training_batch(config, data, number).to(device), learning_rate(config.optimizer, number, config.steps)
        ).loss
        for number in range(config.steps)
    ]


def _digits(config: TrainConfig) -> ImageSet:
    return load_digits(config.data, config.resolution, config.model.in_channels)[0]

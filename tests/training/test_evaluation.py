"""Held-out images: within the budget of tokens, the same for any number of ranks, by the recipe's operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelflow_engine.errors import BackendUnavailableError
from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.operations import PlainOperations
from pixelflow_training import evaluation
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import TrainingImages, load_digits
from pixelflow_training.evaluation import NOT_COUNTED, evaluating_operations, held_out_batches, held_out_loss
from pixelflow_training.loop import build_model
from pixelflow_training.step import batch_losses
from support.recipes import tiny_recipe
from support.reference_models import randomize, seeded

CPU = torch.device("cpu")


def held_out(config: TrainConfig) -> TrainingImages:
    return load_digits(config.data, config.resolution, config.model.in_channels)[1]


@pytest.mark.parametrize(("images", "most", "world_size"), [(21, 40, 1), (21, 40, 2), (9, 16, 2), (5, 1000, 3)])
def test_packs_keep_to_the_budget_and_show_every_image_once(
    images: int, most: int, world_size: int, tmp_path: Path
) -> None:
    config = tiny_recipe(tmp_path, f"data.held_out={images}", f"compute.max_tokens={most}")
    data = held_out(config)
    shown: list[bytes] = []
    counts = []
    for rank in range(world_size):
        batches = list(held_out_batches(config, data, rank, world_size))
        counts.append(len(batches))
        for batch in batches:
            assert batch.layout.num_tokens <= most
            assert batch.layout.num_images <= config.batch_size
            lengths = [rows * columns for rows, columns in batch.layout.grids]
            parts = zip(batch.tokens.split(lengths), batch.stage.tolist(), strict=True)
            shown += [part.numpy().tobytes() for part, stage in parts if stage != NOT_COUNTED]
    assert len(set(counts)) == 1, "ranks gather weights together"
    assert len(shown) == len(set(shown)) == images
    # What an image is does not depend on the parts.
    plain = tiny_recipe(tmp_path, f"data.held_out={images}", f"batch_size={images}")
    (whole,) = held_out_batches(plain, data)
    lengths = [rows * columns for rows, columns in whole.layout.grids]
    assert set(shown) == {part.numpy().tobytes() for part in whole.tokens.split(lengths)}


def test_without_a_budget_a_pack_is_a_batch(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "data.held_out=20")
    sizes = [batch.layout.num_images for batch in held_out_batches(config, held_out(config))]
    assert (len(sizes), sum(sizes)) == (3, 20)


@pytest.mark.parametrize(("images", "world_size"), [(1, 2), (5, 4), (11, 2)])
def test_the_loss_is_the_mean_over_images_however_few_they_are(images: int, world_size: int, tmp_path: Path) -> None:
    """With fewer images than ranks too: a rank without one computes another's, which is not counted."""
    config = tiny_recipe(tmp_path, f"data.held_out={images}", "batch_size=4")
    data, model = held_out(config), build_model(config)
    randomize(model, seeded(3))
    truth: dict[int, list[float]] = {0: [], 1: []}
    for batch in held_out_batches(config, data):
        for loss, stage in zip(batch_losses(model, batch).tolist(), batch.stage.tolist(), strict=True):
            truth[stage].append(loss)
    means = [sum(losses) / len(losses) if losses else None for losses in truth.values()]

    class Adding:
        """Ranks one after the other: each adds what the ones before it have."""

        sums: list[float] | None = None

        def total(self, values: list[float]) -> list[float]:
            self.sums = [a + b for a, b in zip(values, self.sums or [0.0] * len(values), strict=True)]
            return self.sums

    ranks = Adding()
    for rank in range(world_size):
        share = list(held_out_batches(config, data, rank, world_size))
        found = held_out_loss(model, share, 2, ranks)  # type: ignore[arg-type]
    for ours, expected in zip(found, means, strict=True):
        assert ours == (None if expected is None else pytest.approx(expected, rel=1e-6))


def test_operations_are_the_recipe_s_where_they_take_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_recipe(tmp_path, "compute.compile=true")
    assert type(evaluating_operations(config, CPU)) is PlainOperations, "not those that only compiled blocks run"

    def on_a_gpu(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> object:
        assert (dtype, head_dim) == (torch.float32, 8)
        if name == "flash":
            raise BackendUnavailableError("no float32")

        class Triton:
            def operations(self, compiled: bool) -> FusedOperations:
                return FusedOperations("triton")

        return Triton()

    monkeypatch.setattr(evaluation, "choose", on_a_gpu)
    assert isinstance(evaluating_operations(config, CPU), FusedOperations)
    flash = tiny_recipe(tmp_path, "compute.backend=flash", "compute.dtype=bfloat16")
    assert type(evaluating_operations(flash, CPU)) is PlainOperations

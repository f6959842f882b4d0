"""Distances to float64 are those of the engines compared, and show one that is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pixelflow_benchmarks.suites.distance import Variant, distance_table, measure_distance
from pixelflow_engine import Checkpoint, ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig
from support.reference_models import random_reference
from support.results import run_of

CPU = torch.device("cpu")
PLAIN = [Variant(dtype, "torch", False) for dtype in ("float64", "float32", "bfloat16")]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    model = random_reference(3, dtype=torch.float32, heads=2, head_dim=8, depth=1, patch_size=2, num_classes=5)
    config = PixelFlowConfig(
        model=ModelConfig(num_attention_heads=2, attention_head_dim=8, depth=1, patch_size=2, num_classes=5),
        scheduler=SchedulerConfig(num_stages=2),
        resolution=8,
    )
    return Checkpoint(config, model.state_dict(), "random")


def test_fewer_bits_are_further_away(checkpoint: Checkpoint) -> None:
    double, single, half = measure_distance(checkpoint, [0, 3], 3, CPU, PLAIN)
    assert double["velocity"] == double["velocity_last"] == 0
    assert all(psnr > 250 for psnr in double["psnr"])
    assert 1e-8 < single["velocity"] < 1e-4
    assert 1e-3 < half["velocity"] < 1
    assert min(single["psnr"]) > 80 > max(half["psnr"])
    assert [r["variant"] for r in (double, single, half)] == ["float64, torch", "float32, torch", "bfloat16, torch"]


def test_a_wrong_engine_shows(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    made = PixelFlowEngine.from_checkpoint

    def off(*arguments: Any, **options: Any) -> PixelFlowEngine:
        engine = made(*arguments, **options)
        if engine.dtype == torch.float32:
            with torch.no_grad():
                engine.model.proj_out_2.bias += 0.01
        return engine

    (before,) = measure_distance(checkpoint, [1], 3, CPU, PLAIN[1:2])
    monkeypatch.setattr(PixelFlowEngine, "from_checkpoint", off)
    (after,) = measure_distance(checkpoint, [1], 3, CPU, PLAIN[1:2])
    assert after["velocity"] > 100 * before["velocity"]
    assert after["psnr"][0] < before["psnr"][0] - 30


def test_what_cannot_run_is_named_and_left_out_of_the_table(checkpoint: Checkpoint) -> None:
    records = [*measure_distance(checkpoint, [1], 3, CPU, [PLAIN[1], Variant("float32", "flash", False)])]
    assert records[1]["kind"] == "absent"
    assert "'flash' cannot run" in records[1]["reason"]
    run = run_of("distance", *records, model="m", images=1, steps=3)
    assert [row[0] for row in distance_table(run).rows] == ["float32, torch"]

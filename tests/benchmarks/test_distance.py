"""Distances to float64 are those of the engines compared, and show one that is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness.tables import faults
from pixelflow_benchmarks.suites.distance import (
    INTERPRETED,
    VARIANTS,
    Errors,
    Moment,
    Variant,
    distance_table,
    errors_of,
    measure_distance,
)
from pixelflow_engine import Checkpoint, ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig
from support.engines import uncompiled
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
    records = list(measure_distance(checkpoint, [0, 3], 3, CPU, PLAIN))
    double, single, half = (r for r in records if r["kind"] == "distance")
    assert double["velocity"] == double["velocity_last"] == 0
    assert all(psnr > 250 for psnr in double["psnr"])
    assert 1e-8 < single["velocity"] < 1e-4
    assert 1e-3 < half["velocity"] < 1
    assert min(single["psnr"]) > 80 > max(half["psnr"])
    assert not any("fault" in r for r in records)
    assert [r["variant"] for r in (double, single, half)] == ["float64, torch", "float32, torch", "bfloat16, torch"]


def test_a_wrong_engine_shows(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    made = PixelFlowEngine.from_checkpoint

    def off(*arguments: Any, **options: Any) -> PixelFlowEngine:
        engine = made(*arguments, **options)
        if engine.dtype == torch.float32:
            with torch.no_grad():
                engine.model.proj_out_2.bias += 0.01
        return engine

    _, before = measure_distance(checkpoint, [1], 3, CPU, PLAIN[1:2])
    monkeypatch.setattr(PixelFlowEngine, "from_checkpoint", off)
    _, after = measure_distance(checkpoint, [1], 3, CPU, PLAIN[1:2])
    assert after["velocity"] > 100 * before["velocity"]
    assert after["psnr"][0] < before["psnr"][0] - 30
    assert "fault" not in before
    assert after["fault"].startswith("velocity errors ")
    run = run_of("distance", after, model="m", images=1, steps=3)
    assert distance_table(run).rows[0][-1] == "further than allowed"
    assert faults(run) == [f"distance, float32, torch: {after['fault']}"]


def test_an_engine_that_fails_stops_nobody(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PixelFlowEngine.velocity

    def failing(self: PixelFlowEngine, *arguments: Any, **options: Any) -> Any:
        if self.dtype == torch.float32:
            raise RuntimeError("out of resource: shared memory")
        return honest(self, *arguments, **options)

    monkeypatch.setattr(PixelFlowEngine, "velocity", failing)
    records = list(measure_distance(checkpoint, [1], 3, CPU, PLAIN[1:]))
    failed, half = (r for r in records if r["kind"] == "distance")
    assert failed["fault"] == "RuntimeError: out of resource: shared memory"
    assert "fault" not in half
    table = distance_table(run_of("distance", failed, half, model="m", images=1, steps=3))
    assert [row[-1] for row in table.rows] == ["failed", ""]


def test_what_is_allowed_is_twice_the_references_error_and_two_roundings(checkpoint: Checkpoint) -> None:
    """The exact engine has the reference's bits, in each type."""
    found = list(measure_distance(checkpoint, [0, 3], 3, CPU, PLAIN[1:]))
    assert [r["kind"] for r in found] == ["reference", "distance"] * 2
    for reference, record, eps in zip(found[::2], found[1::2], (2.0**-23, 2.0**-7), strict=True):
        for name, allowed in (("velocity", "allowed"), ("velocity_last", "allowed_last")):
            assert record[name] == reference[name] > 0
            assert record[allowed] == pytest.approx(2 * reference[name] + eps, rel=1e-12)
    assert found[0]["variant"] == "float32, reference"


@pytest.mark.parametrize(
    ("usual", "last", "wrong"),
    [(1.0, 1.0, False), (2.0, 20.0, False), (2.1, 1.0, True), (1.0, 20.1, True), (float("inf"), 1.0, True)],
)
def test_more_than_is_allowed_is_a_fault(usual: float, last: float, wrong: bool) -> None:
    assert (Errors(usual, last).fault(Errors(2.0, 20.0)) is not None) == wrong


def test_what_is_not_a_number_has_no_bound() -> None:
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    moments = [Moment(0, t, False, x, x) for t in (1.0, 2.0, 3.0)]
    found = errors_of(lambda x, t: x * torch.nan if t == 2 else x, moments)
    assert found.usual == float("inf")
    assert errors_of(lambda x, t: x + t / 8, moments) == Errors(3 / 8, 0.0)


@pytest.mark.interpret
def test_the_kernels_keep_to_it(checkpoint: Checkpoint) -> None:
    """Under Triton's interpreter, whose rows in a table are those of the command there."""
    _, plain, kernels = measure_distance(checkpoint, [3], 2, CPU, INTERPRETED)
    assert [r["variant"] for r in (plain, kernels)] == ["float32, torch", "float32, triton"]
    assert 0 < kernels["velocity_last"] <= kernels["allowed_last"]
    assert kernels["psnr"] != plain["psnr"], "other operations round otherwise"
    assert "fault" not in kernels


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "distance.jsonl"
    command = ["distance", "--shape", "tiny", "--images", "1", "--steps", "3", "--output", str(output)]
    with uncompiled():
        result = CliRunner().invoke(bench, command)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert (records[0]["model"], records[0]["interpreted"]) == ("tiny, random weights", False)
    assert {r["variant"] for r in records if "variant" in r} >= {variant.name for variant in VARIANTS}
    assert [r["variant"] for r in records if r["kind"] == "reference"] == ["float32, reference", "bfloat16, reference"]
    assert "absent: float32, triton; float32, triton, compiled; bfloat16, triton" in " ".join(result.output.split())


def test_what_cannot_run_is_named_and_left_out_of_the_table(checkpoint: Checkpoint) -> None:
    records = [*measure_distance(checkpoint, [1], 3, CPU, [PLAIN[1], Variant("float32", "flash", False)])]
    assert [r["kind"] for r in records] == ["reference", "distance", "absent"]
    assert "'flash' cannot run" in records[2]["reason"]
    run = run_of("distance", *records, model="m", images=1, steps=3)
    assert [row[0] for row in distance_table(run).rows] == ["float32, reference", "float32, torch"]

"""``bench memory``: the accounts agree with sums done by hand and with each other, and nothing wrong gets a figure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness.tracing import fake, fake_cuda
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.memory import measured, peaks
from pixelflow_benchmarks.suites.memory.counted import FUSED, PLAIN, REFERENCE, count, count_memory
from pixelflow_benchmarks.suites.memory.live import LiveBytes, allocator_peak
from pixelflow_benchmarks.suites.memory.measured import TRAINING, measure_memory, measure_stage, measure_training
from pixelflow_benchmarks.suites.memory.records import with_slopes
from pixelflow_benchmarks.suites.memory.training import count_recipe, training_step
from pixelflow_benchmarks.suites.stages.opponents import Opponents
from pixelflow_benchmarks.suites.stages.problem import StageProblem
from pixelflow_benchmarks.suites.stages.runs import EngineRun
from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.config import parameter_shapes
from pixelflow_training.config import load_config
from pixelflow_training.graphs import shapes_of_steps

CPU = torch.device("cpu")
TINY = StageProblem(config=SHAPES["tiny"], stage=1, batch=3, steps=2, solver="euler", dtype=torch.float32, device=CPU)
KIB = 1024


def made_and_released() -> torch.Tensor:
    """1000, then 3000, 2000, 2500, 500 and 600 KiB, two of which are returned."""
    a = torch.empty(1000 * KIB, dtype=torch.uint8)
    b = torch.empty(2000 * KIB, dtype=torch.uint8)
    del a
    c = torch.empty(500 * KIB, dtype=torch.uint8)
    b.zero_()  # makes nothing
    view = c[: 10 * KIB]
    del b, c
    d = torch.ones(100 * KIB, dtype=torch.uint8)
    return torch.cat([d, view])


def test_both_accounts_of_known_tensors() -> None:
    with LiveBytes("cpu") as live:
        kept = made_and_released()
        assert live.now == 110 * KIB, "what is returned"
    assert live.peak == 3000 * KIB
    del kept
    assert live.now == 110 * KIB, "it counts no more"
    assert allocator_peak(made_and_released) == 3000 * KIB


def test_what_was_there_before_and_other_devices_do_not_count() -> None:
    before = torch.zeros(100 * KIB, dtype=torch.uint8)
    with LiveBytes("cpu") as live:
        before[5:].add_(1).view(-1)
        assert (live.now, live.peak) == (0, 0)
    with LiveBytes("cuda") as live:
        torch.ones(KIB)
    assert live.peak == 0
    with fake_cuda(), LiveBytes("cuda") as live:
        x = fake((3, KIB), torch.float32)
        y = x[1:] + 1
        assert live.now == (3 + 2) * 4 * KIB
        del x, y
        assert live.now == 0


def test_casts_of_weights_live_as_long_as_autocast_keeps_them() -> None:
    weight, other = torch.ones(KIB), torch.ones(KIB)
    with LiveBytes("cpu", [weight]) as live:
        weight.to(torch.bfloat16)
        other.to(torch.bfloat16)
        assert live.now == 2 * KIB
    assert live.peak == 4 * KIB


def real_run(problem: StageProblem, name: str) -> Any:
    weights = random_weights(problem.config, CPU, problem.dtype)
    run = Opponents(problem.config, weights, problem.dtype, None).runs(name, problem)
    assert run is not None
    return run


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("name", ["reference", "torch/eager"])
def test_tensors_are_what_the_allocator_was_asked_for(stage: int, name: str) -> None:
    run = real_run(replace(TINY, stage=stage), name)
    run.run()
    asked = allocator_peak(run.run)
    with LiveBytes("cpu") as live:
        run.run()
    assert 0.999 * asked <= live.peak <= asked


@pytest.mark.parametrize("batch", [1, 3])
def test_the_fake_count_is_that_of_a_real_run(batch: int) -> None:
    problem = replace(TINY, batch=batch, steps=1)
    run = real_run(problem, "torch/eager")
    run.run()
    assert count(PLAIN, problem).activations == pytest.approx(allocator_peak(run.run), rel=0.02)


def published(stage: int, batch: int, depth: int = 1, dtype: torch.dtype = torch.bfloat16) -> StageProblem:
    """The published model with one block, or a few, instead of 28."""
    xl = SHAPES["xl"]
    config = PixelFlowConfig(model=replace(xl.model, depth=depth), scheduler=xl.scheduler, resolution=xl.resolution)
    return StageProblem(config=config, stage=stage, batch=batch, steps=2, solver="euler", dtype=dtype, device=CPU)


@pytest.mark.parametrize("stage", [1, 3])
def test_no_engine_needs_more_than_the_reference(stage: int) -> None:
    """Counted at the published width in float32, where the reference keeps no casts of its weights."""
    problem = published(stage, 1, depth=2, dtype=torch.float32)
    fused, plain, reference = (count(name, problem).activations for name in (FUSED, PLAIN, REFERENCE))
    assert fused < plain < reference


@pytest.mark.parametrize("stage", [0, 1])
def test_the_engine_itself_needs_no_more_than_the_reference(stage: int) -> None:
    """Real runs of the exact engine and of the reference, 288 channels wide."""
    problem = replace(TINY, config=SHAPES["cpu"], stage=stage, batch=1)
    peaks = []
    for name in ("torch/eager", "reference"):
        run = real_run(problem, name)
        with LiveBytes("cpu") as live:
            run.run()
        peaks.append(live.peak)
    engine, reference = peaks
    assert engine <= reference


def test_counts_of_the_published_width() -> None:
    problem = published(3, 1)
    state = 2 * 4096 * 1152 * 2  # the residual stream, both halves, bf16
    fused, plain, reference = (count(name, problem) for name in (FUSED, PLAIN, REFERENCE))
    assert 8 * state < fused.activations < plain.activations < 16 * state
    assert 0 < fused.weights - plain.weights < 2**20, "the patch embedding a second time, in the order of the head"
    assert reference.weights == 2 * plain.weights, "float32"
    small = count(REFERENCE, published(0, 1))
    assert small.activations > 0.8 * plain.weights, "casts of all matrices"
    assert count(FUSED, published(3, 2)).activations == pytest.approx(2 * fused.activations, rel=0.02)


def record(batch: int, peak: int | None, variant: str = "x", work: str = "stage 0") -> dict[str, Any]:
    figures = {} if peak is None else {"peak_bytes": peak}
    return {"shape": "tiny", "work": work, "variant": variant, "batch": batch, **figures}


def test_what_a_further_image_adds() -> None:
    records = [record(4, 70), record(1, 10), record(2, None), record(1, 5, "y"), record(2, 900, work="training")]
    found = list(with_slopes(records))
    assert len(found) == 5
    slopes = {(r["variant"], r["work"], r["batch"]): r.get("per_image_bytes") for r in found}
    assert slopes == {
        ("x", "stage 0", 1): 20,
        ("x", "stage 0", 4): 20,
        ("x", "stage 0", 2): None,
        ("y", "stage 0", 1): None,
        ("x", "training", 2): None,
    }


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "memory.jsonl"
    training = "torch, forward and backward"
    names = ("torch/eager", "triton/graphs", training, "engine, fused")
    options = [word for name in names for word in ("--variant", name)]
    command = ["memory", "--device", "cpu", "--shape", "tiny", "--batch", "1", "--batch", "2", *options]
    result = CliRunner().invoke(bench, [*command, "--output", str(output)])
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    found = {(r["case"], r["variant"]): r for r in records if r["kind"] == "memory"}
    stages = [f"tiny, stage {stage}, batch {batch}" for stage in (0, 1) for batch in (1, 2)]
    assert found.keys() == {
        *((case, name) for case in stages for name in ("reference", "torch/eager", "engine, fused")),
        *((f"tiny, training, batch {batch}", training) for batch in (2, 4)),
    }
    for (_, name), r in found.items():
        assert r["peak_bytes"] == r["weights_bytes"] + r["activation_bytes"]
        assert r["counted"] == (name == "engine, fused")
        assert r.get("right", True)
        assert 0 <= r["per_image_bytes"] < r["peak_bytes"]
    weights = sum(w.nbytes for w in random_weights(SHAPES["tiny"], CPU).values())
    assert found[stages[0], "torch/eager"]["weights_bytes"] == weights
    steps = [found[f"tiny, training, batch {batch}", training] for batch in (2, 4)]
    assert [r["gradient_bytes"] for r in steps] == [weights, weights]
    assert all(r["activation_bytes"] > weights for r in steps)
    assert [r["variant"] for r in records if r["kind"] == "absent"] == ["triton/graphs"]
    assert "gradients" in result.output


def test_when_no_time_is_left_nothing_is_begun_and_all_of_it_is_named() -> None:
    names = ("torch/eager", TRAINING)
    weights = random_weights(TINY.config, CPU)
    found = list(measure_memory("tiny", TINY.config, weights, names, [1], 1, TINY.dtype, CPU, deadline=0.0))
    found += count_memory("tiny", [FUSED], [1], deadline=0.0)
    assert all(r["kind"] == "skipped" and r["reason"] == "no time was left" for r in found)
    assert [(r["case"], r["variants"]) for r in found] == [
        ("tiny, stage 0", ["reference", "torch/eager"]),
        ("tiny, stage 1", ["reference", "torch/eager"]),
        ("tiny, training", [TRAINING]),
        ("tiny, stage 1", [FUSED]),
        ("tiny, stage 0", [FUSED]),
    ]


def test_a_batch_is_not_begun_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 100.0, 100.0, 100.0])  # the first batch of stage 0 takes more than there is
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(measured, "measure_stage", lambda *of: [record(1, 100) | {"kind": "memory", "case": "a batch"}])
    found = list(measure_memory("tiny", TINY.config, {}, ("torch/eager",), [1, 2], 1, TINY.dtype, CPU, deadline=90.0))
    assert [(r["kind"], r["case"]) for r in found] == [
        ("skipped", "tiny, stage 0, batch 2"),
        ("memory", "a batch"),
        ("skipped", "tiny, stage 1"),
    ]


def test_a_stage_is_not_begun_where_a_smaller_one_took_longer_than_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 60.0, 60.0, 60.0])  # stage 0 takes the first minute of 90 seconds
    monkeypatch.setattr(measured, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(measured, "measure_stage", lambda *of: [])
    found = list(measure_memory("tiny", TINY.config, {}, ("torch/eager",), [1], 1, TINY.dtype, CPU, deadline=90.0))
    assert [r["case"] for r in found] == ["tiny, stage 1"]


@pytest.mark.parametrize("names", [[TRAINING], (TRAINING,)], ids=["list", "tuple"])
def test_where_only_training_is_asked_for_no_stage_is_begun(
    names: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "measure_training", lambda *of: record(1, 100, TRAINING, "training"))
    found = list(measure_memory("tiny", TINY.config, {}, names, [1], 1, TINY.dtype, CPU))
    assert [r["variant"] for r in found] == [TRAINING]


def test_an_unknown_variant_is_refused() -> None:
    result = CliRunner().invoke(bench, ["memory", "--variant", "cuda"])
    assert "variant: got 'cuda', expected one of 'reference', " in str(result.exception)


def test_nothing_wrong_gets_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(SHAPES["tiny"], CPU)
    right = EngineRun.run

    def shifted(self: EngineRun, keep_first: bool = False) -> Any:
        ran = right(self, keep_first)
        return replace(ran, first=None if ran.first is None else ran.first + 1)

    def found() -> dict[str, Any]:
        opponents = Opponents(TINY.config, weights, TINY.dtype, None)
        records = list(measure_stage("tiny", TINY, opponents, ("reference", "torch/eager")))
        assert records[0]["right"]
        return records[1]

    monkeypatch.setattr(EngineRun, "run", shifted)
    assert found().keys() == {"kind", "case", "variant", "shape", "work", "batch", "counted", "right", "fault"}
    assert "bound" in found()["fault"]

    def failing(self: EngineRun, keep_first: bool = False) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(EngineRun, "run", failing)
    assert found()["fault"] == "RuntimeError: out of memory"
    nowhere = {name: w * float("nan") for name, w in weights.items()}
    assert measure_training("tiny", TINY.config, nowhere, 2, TINY.dtype, CPU)["fault"] == "the loss is not finite"


def test_a_training_step_leaves_no_gradients() -> None:
    weights = random_weights(TINY.config, CPU)
    step = training_step(TINY.config, weights, 2, torch.float32, CPU)
    step.run()
    assert step.gradients == sum(w.nbytes for w in weights.values())
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_peaks_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up allocator: 100 before, 40 static since then, 25 more in the run; of the pool's 300, tensors hold 7."""
    said: list[str] = []
    cuda = SimpleNamespace(
        synchronize=lambda device: said.append("wait"),
        reset_peak_memory_stats=lambda device: said.append("reset"),
        max_memory_allocated=lambda device: 165,
        max_memory_reserved=lambda device: 900,
        memory_snapshot=lambda: [
            {"segment_pool_id": (0, 1), "total_size": 200, "allocated_size": 7},
            {"segment_pool_id": [0, 1], "total_size": 100, "allocated_size": 0},
            {"segment_pool_id": (0, 0), "total_size": 1000, "allocated_size": 500},
        ],
    )
    monkeypatch.setattr(peaks.torch, "cuda", cuda)
    device = torch.device("cuda")
    found = peaks.peak_of(lambda: said.append("run"), device, 100, None)
    assert said == ["wait", "reset", "run", "wait"]
    assert found == {"activations": 65, "reserved_bytes": 900}
    found = peaks.peak_of(lambda: None, device, 100, (0, 1))
    assert found == {"activations": 65 + 293, "reserved_bytes": 900, "pool_bytes": 300}


def test_every_variant_begins_with_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up: a product allocates 32 for its stream, which stay; the streams of captures come around again."""
    workspaces: dict[str, int] = {}

    class Ones:
        def __matmul__(self, other: Ones) -> Ones:
            workspaces.setdefault("current", 32)
            return self

    cuda = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        synchronize=lambda: None,
        empty_cache=lambda: None,
        memory_allocated=lambda device: 100 + sum(workspaces.values()),
    )
    clear = SimpleNamespace(_cuda_clearCublasWorkspaces=workspaces.clear)
    monkeypatch.setattr(peaks, "torch", SimpleNamespace(cuda=cuda, _C=clear, ones=lambda *_, device: Ones()))
    charged = []
    for sides in (("a",), ("a", "b"), (), ("b",)):
        before = peaks.settle(torch.device("cuda"))
        assert before == 132
        workspaces |= dict.fromkeys(sides, 32)
        charged.append(cuda.memory_allocated("cuda") - before)
    assert charged == [32, 64, 0, 32]


def test_by_how_much_the_process_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 64 * 2**20
    grown = peaks.resident_peak(lambda: bytearray(b"x") * size)
    assert grown is None or 0.9 * size < grown < 2 * size
    monkeypatch.setattr(peaks, "PROCESS", tmp_path / "nowhere")
    assert peaks.resident_peak(lambda: None) is None


def test_the_published_recipe_fits_a_gpu() -> None:
    """Of 80 GB, with room for what a count does not see; its state alone by hand: 16 bytes a weight, 6 for bf16."""
    recipe = load_config("xl-imagenet256")
    assert {sum(rows * columns for rows, columns in part) for (part, *_) in shapes_of_steps(recipe)} == {21_760}
    state, activations = count_recipe(recipe)
    assert state == 22 * sum(torch.Size(shape).numel() for shape in parameter_shapes(recipe.model).values())
    assert state + activations < 0.6 * 80e9
    assert activations > 10e9, "counted is nothing"

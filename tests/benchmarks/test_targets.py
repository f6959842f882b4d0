"""What is aimed at stands beside what was measured, with the right verdict, and says whose aim it is."""

from __future__ import annotations

from typing import Any

import pytest

from pixelflow_benchmarks.harness import targets
from pixelflow_benchmarks.harness.targets import Target, budget_table
from pixelflow_benchmarks.opponents.random_models import SHAPES
from pixelflow_benchmarks.suites.images.table import image_table
from pixelflow_benchmarks.suites.kernels.table import kernel_table
from pixelflow_benchmarks.suites.stages.problem import StageProblem
from pixelflow_benchmarks.suites.stages.table import stage_table
from pixelflow_benchmarks.suites.training.phases import PHASES
from pixelflow_benchmarks.suites.training.table import training_table
from support.results import measurement, run_of, spread_of

H100 = {"gpu": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "shape": "xl"}
OTHER = H100 | {"gpu": "NVIDIA H200"}


def test_verdicts() -> None:
    time, rate = Target(24.2, 22.3, lower=True), Target(400.0, 450.0)
    assert [time.verdict(x) for x in (22.3, 24.2, 26.62)] == ["stretch", "hit", "missed by 10 %"]
    assert [rate.verdict(x) for x in (450.0, 400.0, 300.0)] == ["stretch", "hit", "missed by 25 %"]
    assert Target(3.0).verdict(9.0) == "hit", "there is no more to it"


def test_a_budget_is_above_its_floor() -> None:
    """And the floors are those of the shapes at the rates that the budget names."""
    import torch

    for stage, budget in targets.STAGES.items():
        time = budget.milliseconds
        assert time.stretch is not None
        assert budget.floor < time.stretch < time.value
        assert 0 < budget.share.value < 1
        xl = StageProblem(
            config=SHAPES["xl"],
            stage=stage,
            batch=targets.STAGE_BATCH,
            steps=2,
            solver="euler",
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )
        floor = (xl.flops / 798e12 + xl.pointwise_bytes / 3.0e12) / xl.batch
        assert 1000 * floor == pytest.approx(budget.floor, rel=0.01)


def cells(table: Any, title: str) -> list[str]:
    (place,) = (i for i, name in enumerate(table.header) if name == title)
    assert all(len(row) == len(table.header) for row in table.rows)
    return [row[place] for row in table.rows]


def stage(variant: str, milliseconds: float, share: float, **changed: Any) -> dict[str, Any]:
    fields = {"stage": 3, "batch": 16, "solver": "euler", "fraction_of_floor": share} | changed
    case = f"stage {fields['stage']}, batch {fields['batch']}, {fields['solver']}"
    return measurement(case, variant, milliseconds / 1000, **fields)


def test_stages_on_the_gpu_that_the_budget_is_of_and_on_another() -> None:
    records = [
        stage("reference", 90.0, 0.2),
        stage("triton/graphs", 26.62, 0.6),
        stage("triton/both", 22.0, 0.76),
        stage("triton/both", 0.16, 0.5, stage=0),
        stage("triton/both", 1.0, 0.5, batch=1),
        stage("triton/both", 1.0, 0.5, solver="dopri5"),
    ]
    table = stage_table(run_of("stages", *records, **H100))
    assert cells(table, "target, ms") == ["", "24.2: missed by 10 %", "24.2: stretch", "0.17: hit", "", ""]
    assert cells(table, "target, of floor") == [
        "",
        "69 %: missed by 13 %",
        "69 %: stretch",
        "52 %: missed by 4 %",
        "",
        "",
    ]
    table = stage_table(run_of("stages", *records, **OTHER))
    assert cells(table, "H100's target, ms")[1] == "24.2: missed by 10 %"


@pytest.mark.parametrize("changed", [{"shape": "cpu"}, {"dtype": "float32"}, {"gpu": None}])
def test_other_models_and_types_have_no_targets(changed: dict[str, Any]) -> None:
    head = {name: value for name, value in (H100 | changed).items() if value is not None}
    table = stage_table(run_of("stages", stage("triton/both", 22.0, 0.76), **head))
    assert "target" not in " ".join(table.without_empty().header)
    assert "floor reached" in table.without_empty().header


def test_whole_images() -> None:
    def image(variant: str, seconds: float, batch: int, steps: int, times: float) -> dict[str, Any]:
        more = {"batch": batch, "steps": steps, "fraction_of_floor": 0.5, "first_seconds": 9.0}
        beside = {"published code": spread_of(times)}
        return measurement(f"batch {batch}, euler {steps}", variant, seconds, times=beside, **more)

    records = [
        image("engine, triton", 0.29, 16, 10, 6.5),
        image("engine, triton", 0.99, 16, 30, 3.0),
        image("published code", 2.0, 16, 30, 1.0),
        image("engine, triton", 0.1, 4, 10, 6.5),
    ]
    assert cells(image_table(run_of("images", *records, **H100)), "targets") == [
        "0.3 s: hit; 6 times published: hit",
        "0.9 s: missed by 10 %; 6 times published: missed by 50 %",
        "",
        "6 times published: hit",
    ]


def kernel(case: str, variant: str, seconds: float, flops: float = 0.0, copy: float = 0.5) -> dict[str, Any]:
    more: dict[str, Any] = {"gigabytes_per_second": 1.0, "fraction_of_copy": copy, "flops": flops}
    if flops:
        more |= {"teraflops": flops / seconds / 1e12, "fraction_of_product": 0.5}
    return measurement(case, variant, seconds, **more)


def test_kernels() -> None:
    """The backward pass by itself is what both take together, less the forward pass."""
    forward, both = "varlen_attention.forward", "varlen_attention.forward+backward"
    records = [
        kernel(f"{forward}/stage3-b16", "ours", 0.010, 4.2e12),
        kernel(f"{forward}/stage3-b16", "FlashAttention", 0.010, 4.2e12),
        kernel(f"{both}/stage3-b16", "ours", 0.010 + 0.035, 3.5 * 4.2e12),
        kernel(f"{forward}/stage2-b16", "ours", 0.010, 3.0e12),
        kernel(f"{both}/stage2-b16", "ours", 0.010, 3.0e12),
        kernel("rope2d.rotate/stage3-b16", "ours", 0.010, copy=0.85),
        kernel("rope2d.rotate/stage2-b16", "ours", 0.010, copy=0.6),
        kernel("rope2d.rotate/stage1-b16", "ours", 0.010, copy=0.2),
        kernel("adamw.step/xl", "ours", 0.010, copy=0.9),
    ]
    ceilings = {"kind": "ceilings", "bytes_per_second": 3e12, "flops_per_second": 798e12, "dtype": "bfloat16"}
    run = run_of("kernels", ceilings, *records, batch=16, **H100)
    assert cells(kernel_table(run), "target") == [
        "400 TFLOP/s: hit",
        "",
        "backward 300 TFLOP/s: hit (300)",
        "330 TFLOP/s: missed by 9 %",
        "",
        "80 % of copy: hit",
        "80 % of copy: missed by 25 %",
        "",
        "",
    ]
    run = run_of("kernels", ceilings, *records, batch=16, **OTHER)
    assert cells(kernel_table(run), "target")[0] == "H100's 400 TFLOP/s: hit"


def test_a_time_that_has_the_hosts_launches_in_it_says_so() -> None:
    """What waits for the device is not captured, and launched call by call; on a CPU everything is."""
    records = [
        kernel("rope2d.rotate/stage0-b1", "ours", 0.010) | {"captured": True},
        kernel("rope2d.rotate/stage0-b1", "other", 0.010) | {"captured": False},
    ]
    ceilings = {"kind": "ceilings", "bytes_per_second": 3e12, "flops_per_second": 798e12, "dtype": "bfloat16"}
    table = kernel_table(run_of("kernels", ceilings, *records, batch=1, **H100))
    assert cells(table, "variant") == ["ours", "other, launches included"]
    table = kernel_table(run_of("kernels", ceilings, *records, batch=1, dtype="float32"))
    assert cells(table, "variant") == ["ours", "other"]


def test_training() -> None:
    def step(variant: str, seconds: float, batch: int, times: float) -> dict[str, Any]:
        more = {"batch": batch, "images_per_second": batch / seconds, "tokens_per_second": 1.0, "mfu": 0.5}
        more |= {"flops": 0.40 * 989e12 * 0.5, "shares": dict.fromkeys(PHASES, 0.1)}  # of a step of half a second
        return measurement(f"batch {batch}", variant, seconds, times={"public": spread_of(times)}, **more)

    records = [step("engine, triton", 0.5, 32, 3.5), step("public", 1.75, 32, 1.0), step("engine, triton", 0.5, 4, 3.5)]
    table = training_table(run_of("training", *records, **H100))
    assert cells(table, "targets") == [
        "39 % of 989 TFLOP/s: hit; 72 images/s: missed by 11 %; 3 times published: hit",
        "",
        "",
    ]
    assert cells(training_table(run_of("training", *records, **OTHER)), "H100's targets")[1] == ""


def test_all_of_it_is_in_the_documents_table() -> None:
    table = budget_table()
    said = {row[0]: row[1:] for row in table.rows}
    assert said["stage 3, ms an image and step, batch 16"] == ("24.2 (22.3)", "16.7")
    assert len(table.rows) == len(targets.STAGES) + len(targets.IMAGES) + len(targets.ATTENTION) + 6
    assert "not measurements" in table.title

"""``bench training`` on a CPU at a tiny shape: operations, parts of a step, what a record says."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from typer.testing import CliRunner

from pixelflow_benchmarks.cli import bench
from pixelflow_benchmarks.harness import timing
from pixelflow_benchmarks.harness.timing import Timing
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_reference, random_weights
from pixelflow_benchmarks.suites.training import measure
from pixelflow_benchmarks.suites.training.checks import images_of
from pixelflow_benchmarks.suites.training.measure import (
    breakdown,
    check_and_time,
    figures,
    measure_training,
    steps_in_a_row,
)
from pixelflow_benchmarks.suites.training.opponents import PLAIN, PUBLIC
from pixelflow_benchmarks.suites.training.phases import OTHER, PHASES, PhaseClock
from pixelflow_benchmarks.suites.training.problem import REFERENCE, TrainingProblem, TrainingRun
from pixelflow_benchmarks.suites.training.table import training_table
from pixelflow_training.collate import Batch
from support.results import run_of
from support.training_bench import CEILINGS, CPU, TINY, opponents, run

aten = torch.ops.aten


# --- what a step costs -------------------------------------------------------------------------------------


def counted(problem: TrainingProblem, backward: bool) -> int:
    """By PyTorch's counter, over the reference's own passes, image by image."""
    model = random_reference(problem.config, random_weights(problem.config, CPU), torch.float32).requires_grad_(True)

    def forward_flops(q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward_flops(out: Any, q: Any, k: Any, v: Any, *rest: Any, **more: Any) -> int:
        return sdpa_backward_flop_count(out, q, k, v)

    on_cpu: Any = {  # the counter knows the attention of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
    }
    batch = problem.fixed_batch()
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        for i, x in enumerate(images_of(batch.tokens, batch, problem.config.model.patch_size)):
            labels = None if batch.labels is None else batch.labels[i : i + 1]
            loss = model(x, batch.t_model[i : i + 1], labels).square().mean()
            if backward:
                loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("channels", [3, 1])
def test_operations_are_those_that_pytorch_counts(channels: int) -> None:
    model = replace(TINY.config.model, in_channels=channels, out_channels=channels, depth=3)
    problem = replace(TINY, config=replace(TINY.config, model=model), batch=6)
    assert problem.forward_flops == counted(problem, backward=False)
    assert problem.flops == counted(problem, backward=True)


def test_the_published_model_costs_what_its_table_says() -> None:
    """Products and attention of an image's forward pass at each stage, in GFLOP; what an image adds once is small."""
    xl = TrainingProblem(config=SHAPES["xl"], batch=4, dtype=torch.bfloat16, device=CPU)
    assert xl.lengths == [4096, 1024, 256, 64]
    products, attention = 57 + 228 + 913 + 3653, 0.5 + 8.5 + 135 + 2165
    assert xl.forward_flops == pytest.approx((products + attention) * 1e9, rel=2e-3)
    assert xl.flops == pytest.approx((3 * products + 3.5 * attention) * 1e9, rel=2e-3)
    assert xl.parameters == pytest.approx(677e6, rel=1e-3)
    assert xl.bytes_moved == 2 * 30 * 5440 * 1152 * 28 + 40 * xl.parameters


def test_figures_are_of_a_step() -> None:
    timing = Timing((0.2, 0.1, 0.1))
    found = figures(TINY, timing, CEILINGS)
    assert (found["per"], found["seconds"]["median"], found["seconds"]["repeats"]) == ("step", 0.1, 3)
    assert (found["images_per_second"], found["tokens_per_second"]) == pytest.approx((40, 1600))
    assert found["mfu"] == pytest.approx(TINY.flops / 0.1 / 1e12)
    assert found["floor_seconds"] == pytest.approx(TINY.flops / 1e12 + TINY.bytes_moved / 1e9)
    assert found["fraction_of_floor"] == pytest.approx(found["floor_seconds"] / 0.1)


@pytest.mark.parametrize("batch", [0, 3])
def test_a_batch_has_equally_many_images_of_each_stage(batch: int) -> None:
    with pytest.raises(ValueError, match=f"batch: got {batch}, expected a multiple of 2"):
        replace(TINY, batch=batch)


# --- parts of a step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("took", "steps"), [([0.03, 0.02], 10), ([0.1, 0.17], 4), ([0.35], 1), ([7.0, 2.0], 1), ([], 1)]
)
def test_short_steps_are_timed_in_a_row(took: list[float], steps: int) -> None:
    assert steps_in_a_row(took) == steps


@pytest.mark.parametrize("name", [PLAIN, REFERENCE])
def test_parts_of_a_step_add_up_to_it(name: str) -> None:
    shares = breakdown(run(name), CPU, steps=2)
    assert tuple(shares) == (*PHASES, OTHER)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert all(shares[part] > 0 for part in PHASES)
    assert 0 <= shares[OTHER] < 0.5


def test_few_long_steps_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(step=3.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(now))  # every look takes three seconds
    who, steps = run(PLAIN), []
    monkeypatch.setattr(who, "step", lambda clock: steps.append(clock.took({"forward": 1.0}, 2.0)))
    assert breakdown(who, CPU)["forward"] == 0.5
    assert len(steps) == 1


def test_the_clock_adds_up_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))  # every look takes a second
    clock = PhaseClock(CPU)
    for _ in range(2):
        with clock.step():
            for part in ("forward", "backward", "forward"):
                with clock(part):
                    pass
    assert clock.seconds == dict.fromkeys(PHASES, 0.0) | {"forward": 4.0, "backward": 2.0}
    assert clock.whole == 14
    clock.took({"forward": 2.0}, 6.0)
    assert clock.shares()["forward"] == pytest.approx(0.3)
    assert clock.shares()[OTHER] == pytest.approx(1 - 8 / 20)
    with pytest.raises(ValueError, match="phase: got 'loss', expected one of batch"), clock("loss"):
        pass


class Event:
    """Stands for one of CUDA's: it can be read once the device has come to it."""

    now, idle = 0.0, True

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        Event.idle, self.at = False, Event.now

    def elapsed_time(self, other: Event) -> float:
        assert Event.idle, "read before the device was done"
        return other.at - self.at


def test_on_a_gpu_events_stand_between_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def wait(device: torch.device) -> None:
        Event.idle = True
        waited.append(Event.now)

    monkeypatch.setattr("pixelflow_benchmarks.suites.training.phases.wait_for", wait)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: object())
    clock = PhaseClock(torch.device("cuda"))
    with clock.step():
        for part, milliseconds in (("forward", 30.0), ("backward", 60.0)):
            with clock(part):
                Event.now += milliseconds
        Event.now += 10
    assert clock.shares() == pytest.approx(dict.fromkeys(PHASES, 0.0) | {"forward": 0.3, "backward": 0.6, OTHER: 0.1})
    assert clock.whole == pytest.approx(0.1)
    assert waited == [0, 100], "it waits between steps alone"


# --- records -----------------------------------------------------------------------------------------------


def measured(wrong: Mapping[str, Any], repeats: int = 2) -> dict[str, dict[str, Any]]:
    """Records by variant, some runs' methods replaced."""
    who = opponents()
    found: dict[str, TrainingRun] = {name: run(name, who) for name in (REFERENCE, PLAIN)}
    for method, function in wrong.items():
        setattr(found[PLAIN], method, function)
    return {r["variant"]: r for r in check_and_time(TINY, found, who, CEILINGS, repeats)}


def test_a_record_says_what_was_measured() -> None:
    found = measured({})
    for name in (REFERENCE, PLAIN):
        r = found[name]
        assert (r["kind"], r["case"], r["right"], r["tokens"]) == ("measurement", "batch 4", True, 160)
        assert r["seconds"]["repeats"] == 2
        assert r["first_seconds"] > 0
        assert r["times"][REFERENCE]["repeats"] == 2
        assert sum(r["shares"].values()) == pytest.approx(1)
        assert not {"fault", "peak_bytes", "joules"} & set(r), "a CPU has no counters"
    assert found[REFERENCE]["times"][REFERENCE]["median"] == 1


def test_seconds_are_those_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def turns_of_four_seconds(turns: Mapping[str, Callable[[], None]], *_: Any) -> timing.Runs:
        return timing.Runs({name: Timing((4.0, 4.0)) for name in turns}, {})

    monkeypatch.setattr(measure, "time_runs", turns_of_four_seconds)
    record = measured({})[PLAIN]
    assert record["seconds"]["median"] == 4.0 / record["steps_in_a_row"]
    assert record["steps_in_a_row"] > 1, "steps of a tiny model are short"


def raising(said: str) -> Callable[..., Any]:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError(said)

    return fail


def half_a_loss(model: Any, batch: Batch) -> Tensor:
    """As if tokens, not images, had equal weights."""
    out = model(batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels)
    return (out - batch.targets).square().mean()[None].expand(4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"_losses": lambda batch: half_a_loss(run(PLAIN).model, batch)}, "loss: error"),
        ({"gradients": raising("a compiler failed\nhere")}, "RuntimeError: a compiler failed"),
        (
            {"step": lambda phases: None, "last": lambda: SimpleNamespace(loss=1.0, norm=1.0)},
            "weights moved by up to 0",
        ),
        ({"last": lambda: SimpleNamespace(loss=math.nan, norm=1.0)}, "expected finite numbers"),
        ({"draw": lambda: replace(TINY.fixed_batch(), t_model=torch.zeros(4) + 0.1)}, "none of its stage's"),
    ],
    ids=["loss", "raises", "no step", "not finite", "batch"],
)
def test_nothing_wrong_gets_a_time(wrong: Mapping[str, Any], said: str) -> None:
    found = measured(wrong)
    assert not found[PLAIN]["right"]
    assert said in found[PLAIN]["fault"]
    assert "seconds" not in found[PLAIN]
    assert found[REFERENCE]["right"]
    assert found[REFERENCE]["seconds"]["repeats"] == 2


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 20 GiB",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_too_little_memory_is_no_fault(said: str) -> None:
    found = measured({"gradients": raising(said)})
    assert found[PLAIN] == {
        "kind": "absent", "case": "batch 4", "variant": PLAIN, "reason": "batch 4: not enough memory",
    }  # fmt: skip
    assert found[REFERENCE]["right"]


def test_when_no_time_is_left_nothing_is_begun() -> None:
    left = {"case": "batch 4", "reason": "no time was left"}
    assert list(measure_training(TINY, opponents(), (PLAIN,), CEILINGS, 3, deadline=0.0)) == [
        {"kind": "skipped", **left}
    ]
    who = opponents()
    runs: dict[str, TrainingRun] = {name: run(name, who) for name in (REFERENCE, PLAIN)}
    skipped, first = check_and_time(TINY, runs, who, CEILINGS, 3, deadline=0.0)
    assert skipped == {"kind": "skipped", "variant": PLAIN, **left}
    assert (first["variant"], first["seconds"]["repeats"]) == (REFERENCE, 1)


def test_no_turn_is_begun_after_a_minute_though_nobody_gave_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TURNS_SECONDS", -1.0)
    (found,) = check_and_time(TINY, {REFERENCE: run(REFERENCE)}, opponents(), CEILINGS, 3)
    assert found["seconds"]["repeats"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command(dtype: str, tmp_path: Path) -> None:
    output = tmp_path / "training.jsonl"
    who = [word for name in (PLAIN, "engine, triton", PUBLIC) for word in ("--variant", name)]
    command = ["training", "--device", "cpu", "--shape", "tiny", "--repeats", "3", *who, "--output", str(output)]
    what = ["--batch", "2", "--batch", "4", *(["--dtype", dtype] if dtype != "float32" else [])]
    result = CliRunner().invoke(bench, [*command, *what], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["kind"] for r in records] == [
        "environment", "ceilings", "absent", "absent", *["measurement"] * 4, "end",
    ]  # fmt: skip
    assert [r["variant"] for r in records if r["kind"] == "absent"] == ["engine, triton", PUBLIC], "told once"
    measurements = [r for r in records if r["kind"] == "measurement"]
    assert [(r["case"], r["variant"]) for r in measurements] == [
        (f"batch {n}", name) for n in (2, 4) for name in (REFERENCE, PLAIN)
    ]
    assert all(r["right"] for r in measurements)
    assert "absent: engine, triton" in result.output
    assert (records[0]["dtype"], records[1]["dtype"]) == (dtype, dtype)
    assert f"Steps of training, tiny, {dtype}" in " ".join(result.output.split())


def test_an_unknown_opponent_is_refused() -> None:
    result = CliRunner().invoke(bench, ["training", "--device", "cpu", "--shape", "tiny", "--variant", "engine"])
    assert isinstance(result.exception, ValueError)
    assert "variant: got 'engine', expected one of 'engine, plain', " in str(result.exception)


def test_the_table_has_a_row_for_each() -> None:
    records = list(measured({}).values())
    wrong = {"kind": "measurement", "case": "batch 4", "variant": "x", "right": False, "fault": "loss: error"}
    table = training_table(run_of("training", *records, wrong, shape="tiny", dtype="float32"))
    assert [row[1] for row in table.rows] == [REFERENCE, PLAIN, "x"]
    assert table.rows[2][2:4] == ("wrong: no time", "loss: error")
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[1][2].startswith(f"{1000 * records[1]['seconds']['median']:.1f} (")
    assert table.rows[0][6] == "1.00 (1.00 to 1.00)"
    assert 80 < sum(float(share) for share in table.without_empty().rows[0][-1].split(" / ")) < 104

"""``bench training`` on a CPU at a tiny shape: operations, what is checked, parts of a step, what a record says."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.harness.timing import Timing
from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.public_training import TrainingServer
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_reference, random_weights
from pixelflow_benchmarks.suites.training import runs as training_runs
from pixelflow_benchmarks.suites.training.checks import (
    Expected,
    batch_faults,
    gradient_faults,
    images_of,
    move_faults,
    reference_gradients,
)
from pixelflow_benchmarks.suites.training.measure import breakdown, check_and_time, figures, measure_training
from pixelflow_benchmarks.suites.training.opponents import PLAIN, PUBLIC, TrainingOpponents
from pixelflow_benchmarks.suites.training.phases import OTHER, PHASES, UNTIMED, PhaseClock
from pixelflow_benchmarks.suites.training.problem import (
    IMAGES,
    REFERENCE,
    SEED,
    Gradients,
    TrainingProblem,
    TrainingRun,
)
from pixelflow_benchmarks.suites.training.public import PublicRun
from pixelflow_benchmarks.suites.training.runs import EngineRun, ReferenceRun
from pixelflow_benchmarks.suites.training.table import training_table
from pixelflow_engine.checkpoint import load_checkpoint
from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.data import ImageSet
from pixelflow_training.draws import sample_ids
from support.results import run_of

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float32)
TINY = TrainingProblem(config=SHAPES["tiny"], batch=4, dtype=torch.float32, device=CPU)
WEIGHTS = random_weights(TINY.config, CPU)
aten = torch.ops.aten


def opponents(weights: Mapping[str, Tensor] = WEIGHTS, public: Path | None = None) -> TrainingOpponents:
    return TrainingOpponents(TINY.config, weights, TINY.dtype, CPU, public)


def run(name: str, who: TrainingOpponents | None = None) -> Any:
    found = (who or opponents()).run(name, TINY)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def gradients() -> tuple[Batch, Gradients, Expected]:
    """The fixed batch; the reference's gradients there in float32, and what is expected."""
    batch = TINY.fixed_batch()
    plain, truth = (reference_gradients(TINY, WEIGHTS, batch, t) for t in (torch.float32, torch.float64))
    return batch, plain, Expected.of(plain, truth, torch.float32)


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


# --- right first -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [PLAIN, REFERENCE])
def test_right_gradients_and_batches_pass(name: str, gradients: tuple[Batch, Gradients, Expected]) -> None:
    batch, _, expected = gradients
    who = run(name)
    assert gradient_faults(who.gradients(batch), expected) == []
    for _ in range(5):
        assert batch_faults(who.draw(), TINY, TINY.images()) == []


def test_the_truth_is_a_derivative(gradients: tuple[Batch, Gradients, Expected]) -> None:
    """By a difference of losses, along a direction that all parameters have a part in."""
    batch, _, expected = gradients
    truth = expected.truth
    generator = torch.Generator().manual_seed(3)
    way = {name: torch.randn(g.shape, generator=generator, dtype=torch.float64) for name, g in truth.by_name.items()}
    losses = []
    for step in (1e-5, -1e-5):
        moved = {name: w.double() + step * way[name] for name, w in WEIGHTS.items()}
        losses.append(reference_gradients(TINY, moved, batch, torch.float64).losses.mean().item())
    slope = sum((truth.by_name[name] * way[name]).sum().item() for name in way)
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g.losses.mul_(1.00001), "loss"),
        (lambda g: g.losses[2:3].fill_(math.nan), "loss"),
        (lambda g: g.by_name["proj_out_2.bias"].mul_(1.0001), "gradient of proj_out_2.bias:"),
        (lambda g: g.by_name["patch_embed.proj.weight"][3, 1].zero_(), "gradient of patch_embed.proj.weight:"),
        (
            lambda g: g.by_name["transformer_blocks.1.attn1.q_norm.weight"][5].fill_(math.nan),
            "gradient of transformer_blocks.1.attn1.q_norm.weight:",
        ),
        (lambda g: [v.mul_(1.001) for v in g.by_name.values()], "gradient norm"),
        (lambda g: g.by_name.pop("proj_out_1.bias"), "1 parameters have a gradient on one side alone"),
    ],
    ids=["loss", "one loss is no number", "scaled", "a row is gone", "no number", "all scaled", "missing"],
)
def test_wrong_losses_and_gradients_are_found(
    change: Callable[[Gradients], object], said: str, gradients: tuple[Batch, Gradients, Expected]
) -> None:
    _, plain, expected = gradients
    found = Gradients(plain.losses.clone(), {name: g.clone() for name, g in plain.by_name.items()})
    assert gradient_faults(found, expected) == []
    change(found)
    faults = gradient_faults(found, expected)
    assert any(said in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: replace(b, t_model=b.t_model + 0.01), "none of its stage's"),
        (lambda b: replace(b, targets=b.targets.roll(1, 0)), "of no image that is left"),
        (lambda b: replace(b, tokens=b.tokens * 1.0001), "of no image that is left"),
        (lambda b: replace(b, labels=(b.labels + 1) % 10), "of no image that is left"),
        (lambda b: replace(b, stage=b.stage.clamp(max=0)), "expected equally many"),
    ],
    ids=["time", "target", "scale", "label", "stage"],
)
def test_wrong_batches_are_found(change: Callable[[Batch], Batch], said: str) -> None:
    batch = run(PLAIN).draw()
    (fault,) = batch_faults(change(batch), TINY, TINY.images())
    assert said in fault


@pytest.mark.parametrize("name", [PLAIN, REFERENCE])
def test_labels_are_dropped_as_the_settings_say(name: str) -> None:
    who, null = run(name), TINY.config.model.num_classes
    labels = torch.cat([batch.labels for batch in (who.draw() for _ in range(100)) if batch.labels is not None])
    share = (labels == null).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 400) ** 0.5


def test_an_image_may_not_come_twice_and_noise_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TINY.images()
    one = ImageSet(data.images[:1].expand(4, -1, -1, -1), data.labels[:1].expand(4))
    who = run(PLAIN)
    who.data = one
    (fault,) = batch_faults(who.draw(), TINY, ImageSet(data.images[:3], data.labels[:3]))
    assert "of no image that is left" in fault
    monkeypatch.setattr(torch, "randn", lambda *shape, **more: torch.zeros(*shape))
    (fault,) = batch_faults(run(REFERENCE).draw(), TINY, data)
    assert "noise of mean" in fault


def test_a_step_moves_weights_as_adam_can() -> None:
    weight, average = torch.ones(4), torch.ones(4)
    after = weight - 1e-4 * torch.tensor([1.0, -1, 0.5, 1]), average - 1e-8 * 8
    assert move_faults((weight, average), after, 1e-4) == []
    for wrong, said in (
        ((weight, after[1]), "weights moved by up to 0.000e+00"),
        ((weight - 1e-3, after[1]), "weights moved"),
        ((after[0] * math.nan, after[1]), "weights moved"),
        ((after[0], average), "averaged weights did not follow"),
        ((after[0], after[1] * math.nan), "averaged weights did not follow"),
    ):
        (fault,) = move_faults((weight, average), wrong, 1e-4)
        assert said in fault


def test_variants_train_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by a model of its own, one of them in bf16; moments, averages and counts are everybody's."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    who = TrainingOpponents(TINY.config, WEIGHTS, torch.bfloat16, CPU, None)
    problem = replace(TINY, dtype=torch.bfloat16)
    one, other = (who.run(name, problem) for name in (PLAIN, "engine, compiled"))
    assert isinstance(one, EngineRun)
    assert isinstance(other, EngineRun)
    assert one.model is not other.model
    for each in (one, other):
        each.step(UNTIMED)
    assert one.train_step.state.ema.step == other.train_step.state.ema.step == 2
    assert one.parameters.keys() == other.parameters.keys() == who.parameters.keys()
    assert all(one.parameters[name] is other.parameters[name] is p for name, p in who.parameters.items())
    who.reset()
    one.gradients(problem.fixed_batch())
    for name, p in one.model.named_parameters():
        assert torch.equal(p, WEIGHTS[name].bfloat16()), "the copy computes with weights of before"
    larger = who.run(PLAIN, replace(problem, batch=6))
    assert isinstance(larger, EngineRun)
    assert larger.model is one.model, "what was compiled and copied serves all sizes"
    assert (larger.train_step.config.batch_size, one.train_step.config.batch_size) == (6, 4)


def test_graphs_are_absent_where_there_are_none() -> None:
    who = opponents()
    assert who.run("engine, triton, graphs", TINY) is None
    assert "backend: 'triton' cannot run" in who.absent["engine, triton, graphs"]


def test_the_engines_step_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps here and four of ``pixelflow train`` on the same images end with the same averages, bit for bit."""
    recipe = replace(TINY.recipe, steps=4, eval_every=4)
    monkeypatch.setattr(loop, "open_data", lambda *settings: (TINY.images(), TINY.images()))
    folder = loop.train(recipe, tmp_path / "run", quiet=True)
    who = run(PLAIN, opponents({name: w.clone() for name, w in loop.build_model(recipe).state_dict().items()}))
    for _ in range(4):
        who.step(UNTIMED)
    expected = load_checkpoint(folder).state_dict
    for name, average in who.averages().items():
        assert torch.equal(average, expected[name]), name


def test_both_loops_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one batch: the same loss, norm and weights, but for rounding. Adam divides by it where a gradient is small."""
    batch, ends = TINY.fixed_batch(), []
    monkeypatch.setattr(EngineRun, "draw", lambda self: batch)
    monkeypatch.setattr(ReferenceRun, "_batch", lambda self: training_runs.listed(batch, TINY.config))
    for name in (PLAIN, REFERENCE):
        who = run(name)
        who.step(UNTIMED)
        ends.append((who.last(), who.probe()[0]))
        # Adam does not care how long a gradient is; its first moment tells what the clip left of it.
        moment = sum(state["exp_avg"].double().square().sum().item() for state in who.optimizer.state.values()) ** 0.5
        assert moment == pytest.approx(0.1 * who.recipe.optimizer.max_grad_norm, rel=1e-5)
    assert ends[0][0].loss == pytest.approx(ends[1][0].loss, rel=1e-5)
    assert ends[0][0].norm == pytest.approx(ends[1][0].norm, rel=1e-5)
    assert ends[0][0].norm > 1, "the clip has something to do"
    assert (ends[0][1] - ends[1][1]).abs().max() < 1e-6


# --- parts of a step ---------------------------------------------------------------------------------------


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


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "training.jsonl"
    who = [word for name in (PLAIN, "engine, triton", PUBLIC) for word in ("--variant", name)]
    command = ["training", "--device", "cpu", "--shape", "tiny", "--repeats", "3", *who, "--output", str(output)]
    sizes = ["--batch", "2", "--batch", "4"]
    result = CliRunner().invoke(bench, [*command, *sizes], env={"COLUMNS": "200"})
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
    assert "Steps of training, tiny, float32" in " ".join(result.output.split())


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


# --- the published code's process --------------------------------------------------------------------------

CHECKOUT = {
    "diffusers/models/embeddings.py": """
from pixelflow_benchmarks.suites.training.public_shape import rotary_table

def get_2d_rotary_pos_embed(embed_dim, crops_coords, grid_size):
    return rotary_table(grid_size[0], embed_dim)
""",
    "pixelflow/model.py": """
import torch
from pixelflow_benchmarks.suites.training.public_shape import ListedBatch, packed_velocities
from pixelflow_engine.reference import PixelFlowTransformer

flash_attn_varlen_func = print

class PixelFlowModel(PixelFlowTransformer):
    def __init__(self, attention_bias, **fields):
        super().__init__(**fields)
        self.class_embedder.dropout_prob = 0.1

    def forward(
        self, hidden_states, class_labels, timestep, latent_size, pos_embed, cu_seqlens_q, seqlen_list_q
    ):
        labels = class_labels.clone()
        if self.class_embedder.dropout_prob > 0:
            labels[0] = self.num_classes
        return packed_velocities(self, ListedBatch(
            tokens=hidden_states, targets=hidden_states, rotary=pos_embed, cu_seqlens=cu_seqlens_q, t_model=timestep,
            sizes=latent_size, labels=labels.tolist(), lengths=seqlen_list_q, stages=[],
        ))
""",
    "pixelflow/scheduling_pixelflow.py": """
class PixelFlowScheduler:
    def __init__(self, steps, num_stages):
        self.generator = __import__("torch").Generator().manual_seed(5)
""",
    "pixelflow/data_in1k.py": """
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from pixelflow_benchmarks.opponents.random_models import SHAPES
from pixelflow_training.collate import make_batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import plan_step

def collate_fn(examples, config, noise_scheduler_copy):
    assert (config.model.params.patch_size, config.scheduler.num_stages) == (2, 2)
    images, labels = torch.stack([x for x, _ in examples]), torch.tensor([label for _, label in examples])
    network, seed = SHAPES["tiny"], int(torch.randint(2**31, (), generator=noise_scheduler_copy.generator))
    recipe = TrainConfig(model=network.model, scheduler=network.scheduler, resolution=network.resolution,
                         batch_size=len(images), label_drop=0.0, seed=seed)
    plan = plan_step(recipe, 0, len(images))
    batch = make_batch(images[plan.position], labels[plan.position], plan, network)
    sides = batch.latent_size.tolist()
    places = [get_2d_rotary_pos_embed(config.model.params.attention_head_dim, None, (n, n)) for n in sides]
    return {
        "pixel_values": batch.tokens, "target_values": batch.targets, "input_ids": batch.labels.tolist(),
        "pos_embed": torch.cat([torch.stack(table, -1) for table in places]), "timesteps": batch.t_model,
        "cumsum_q_len": batch.layout.cu_seqlens, "batch_latent_size": batch.latent_size,
        "seqlen_list_q": [n * n for n in sides], "cumsum_kv_len": None,
    }
""",
    "train.py": """
import torch

@torch.no_grad()
def update_ema(ema_model, model, decay=0.9999):
    for average, weight in zip(ema_model.parameters(), model.parameters()):
        average.mul_(decay).add_(weight, alpha=1 - decay)
""",
}
"""What of a checkout is asked for, in few lines."""


@contextmanager
def checkout(folder: Path) -> Iterator[Path]:
    """Such a checkout, whose modules are gone afterwards."""
    for name, text in CHECKOUT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before, path = set(sys.modules), list(sys.path)
    yield folder
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("pixelflow", "diffusers", "train"):
            del sys.modules[name]


class InThisProcess(PublicProcess):
    """Answers as the other process does, without one."""

    def __init__(self, server: TrainingServer, folder: Path) -> None:
        self.server, self.folder = server, SimpleNamespace(name=str(folder))  # type: ignore[assignment]
        self.asked: list[str] = []

    @property
    def ended(self) -> bool:
        return False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        request = json.loads(json.dumps(request))
        self.asked.append(request["do"])
        found: dict[str, Any] = json.loads(json.dumps(getattr(self.server, request.pop("do"))(**request)))
        return found


def test_the_published_step_is_checked_and_timed(tmp_path: Path, gradients: tuple[Batch, Gradients, Expected]) -> None:
    batch, _, expected = gradients
    with checkout(tmp_path), torch.random.fork_rng():
        process = InThisProcess(TrainingServer(tmp_path, "tiny", "float32", "cpu"), tmp_path)
        who = PublicRun(process, TINY)
        assert gradient_faults(who.gradients(batch), expected) == [], "no label may be dropped here"
        assert process.server.model.class_embedder.dropout_prob == 0.1
        for step in range(2):  # the images that the other loops see
            drawn, ids = who.draw(), sample_ids(SEED, TINY.positions(step), IMAGES)
            assert batch_faults(drawn, TINY, TINY.images()) == []
            assert drawn.labels is not None
            assert sorted(drawn.labels.tolist()) == sorted(TINY.images().labels[ids].tolist())
        before = who.probe()
        who.step(UNTIMED)
        assert move_faults(before, who.probe(), 1e-4) == []
        assert who.last().norm > 0
        assert math.isfinite(who.last().loss)
        shares = breakdown(who, CPU, steps=2)
        assert sum(shares.values()) == pytest.approx(1)
        assert all(shares[part] > 0 for part in PHASES)
        assert who.peak_bytes() is None
        again = PublicRun(process, TINY)
        assert torch.equal(again.probe()[0], WEIGHTS["proj_out_2.weight"]), "a problem begins with the first weights"
        again.close()
        assert process.asked[-1] == "release"


def test_without_attention_for_packs_it_cannot_train(tmp_path: Path) -> None:
    with checkout(tmp_path):
        (tmp_path / "pixelflow/model.py").write_text("flash_attn_varlen_func = None\n")
        with pytest.raises(RuntimeError, match="needs FlashAttention's call for packs, which is not there: on cpu"):
            TrainingServer(tmp_path, "tiny", "float32", "cpu")


def test_a_checkout_that_does_not_start_is_absent(tmp_path: Path) -> None:
    who = opponents(public=tmp_path)
    assert who.run(PUBLIC, TINY) is None
    assert "expected a folder with pixelflow/model.py" in who.absent[PUBLIC]
    who.close()

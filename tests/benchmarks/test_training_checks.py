"""``bench training``: what is checked before a step is timed, and that all variants take the same step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixelflow_benchmarks.suites.training import runs as training_runs
from pixelflow_benchmarks.suites.training.checks import (
    Expected,
    batch_faults,
    gradient_faults,
    move_faults,
    reference_gradients,
)
from pixelflow_benchmarks.suites.training.opponents import PLAIN, TrainingOpponents
from pixelflow_benchmarks.suites.training.phases import UNTIMED
from pixelflow_benchmarks.suites.training.problem import REFERENCE, Gradients
from pixelflow_benchmarks.suites.training.runs import EngineRun, ReferenceRun
from pixelflow_engine.checkpoint import load_checkpoint
from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.data import ImageSet, Loader
from support.training_bench import CPU, TINY, WEIGHTS, fixed_gradients, opponents, run


@pytest.fixture(scope="module")
def gradients() -> tuple[Batch, Gradients, Expected]:
    return fixed_gradients()


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
    assert isinstance(who, EngineRun)
    who.loader = Loader(one, who.recipe, first_step=0)
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


def test_images_reach_the_device_as_bytes() -> None:
    """As in training: what is made of them is made there."""
    who = run(PLAIN)
    assert isinstance(who, EngineRun)
    on_gpu = EngineRun(replace(TINY, device=torch.device("cuda", 0)), who.train_step)
    assert on_gpu.loader.device == torch.device("cuda", 0)
    assert on_gpu.data.images.dtype == torch.uint8


def test_both_loops_take_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one batch: the same loss, norm and weights, but for rounding. Adam divides by it where a gradient is small."""
    batch, ends = TINY.fixed_batch(), []
    monkeypatch.setattr(EngineRun, "_batch", lambda self: batch)
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

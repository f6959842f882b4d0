"""Losses that are not finite change nothing and are told; losses that stand out are told."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Container
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits as load_scans
from torch import Tensor

from pixelflow_engine import PixelFlowEngine
from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import ImageSet, enlarge, load_digits
from pixelflow_training.draws import sample_ids
from pixelflow_training.guard import ENOUGH, WINDOW, LossHistory, Spike
from support.recipes import tiny_recipe
from support.runs import digest, lines, outcome, state_of


def poison(monkeypatch: pytest.MonkeyPatch, steps: Container[int], value: float = math.nan) -> None:
    """The batches of some steps (from 1) have a target that is not finite."""
    honest = loop.training_batch

    def poisoned(config: TrainConfig, data: ImageSet, step: int, *share: int) -> Batch:
        batch = honest(config, data, step, *share)
        if step + 1 in steps:
            batch.targets[0, 0] = value
        return batch

    monkeypatch.setattr(loop, "training_batch", poisoned)


@cache
def scans_by_pixels(resolution: int) -> dict[bytes, int]:
    """The number of each scan, for whom its picture is known."""
    return {enlarge(scan, resolution).tobytes(): number for number, scan in enumerate(load_scans().images)}


def samples(config: TrainConfig, step: int) -> list[str]:
    """Of a step from 1, the names, by what the pictures show."""
    data, _ = load_digits(config.data, config.resolution, config.model.in_channels)
    positions = torch.arange((step - 1) * config.batch_size, step * config.batch_size)
    ids = sample_ids(config.seed, positions, len(data))
    return sorted(f"scan {scans_by_pixels(config.resolution)[image.numpy().tobytes()]}" for image in data.images[ids])


# --- not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    config = tiny_recipe(tmp_path, "steps=4", "checkpoint.every=1", "checkpoint.keep=9")
    poison(monkeypatch, {3}, value)
    run = tmp_path / "run"
    loop.train(config, run, quiet=True)
    states = {}
    for step in (4, 3, 2):
        (run / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        states[step] = state_of(run, config)
    before, after = states[2].tensors(), states[3].tensors()
    for group in ("model", "optimizer", "ema", "losses"):
        assert digest({group: before[group]}) == digest({group: after[group]}), group
        assert digest({group: states[4].tensors()[group]}) != digest({group: after[group]}), group
    assert (states[3].step, states[3].ema.step, states[3].skipped, states[3].skipped_in_row) == (3, 2, 1, 1)
    assert (states[4].step, states[4].ema.step, states[4].skipped, states[4].skipped_in_row) == (4, 3, 1, 0)
    (line,) = [line for line in lines(run) if line["step"] == 3]
    assert line["event"] == "skipped"
    assert line["loss"] == str(value)
    assert line["skipped"] == 1
    assert line["samples"] == samples(config, 3)
    # Full resolution first: the poisoned token is of the last stage.
    assert line["stage_loss"][1] == str(value)
    assert math.isfinite(float(line["stage_loss"][0]))


class Asked:
    """Images that note who was asked for."""

    def __init__(self) -> None:
        self.labels = torch.arange(40) % 10
        self.numbers: list[int] = []

    def name(self, sample: int) -> str:
        return f"image {sample:02d}"

    def load(self, sample: int) -> Tensor:
        self.numbers.append(sample)
        return torch.full((1, 18, 18), sample, dtype=torch.uint8)


def test_images_of_a_source_are_named_as_it_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by their place in a part of it that nobody can look up."""
    source, honest, named = Asked(), loop.training_batch, []

    def poisoned(config: TrainConfig, data: Any, step: int, *share: int) -> Batch:
        source.numbers.clear()
        batch = honest(config, data, step, *share)
        named.append(sorted(map(source.name, source.numbers)))
        batch.targets[0, 0] = math.nan
        return batch

    monkeypatch.setattr(loop, "training_batch", poisoned)
    config = tiny_recipe(tmp_path, "data.held_out=4", "guard.max_skipped=1")
    with pytest.raises(FloatingPointError):
        loop.train(config, tmp_path / "run", quiet=True, source=source)
    batches = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert [batch["samples"] for batch in batches] == [line["samples"] for line in lines(tmp_path / "run")]
    assert [batch["samples"] for batch in batches] == named[:2], "a third one was made ahead"
    assert len(batches) == 2


def test_a_gradient_that_is_not_finite_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = loop.torch.nn.utils.clip_grad_norm_, []

    def overflowing(*arguments: Any) -> Any:
        calls.append(norm := honest(*arguments))
        return norm * math.inf if len(calls) == 2 else norm

    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", overflowing)
    config = tiny_recipe(tmp_path, "steps=3")
    loop.train(config, tmp_path / "run", quiet=True)
    assert [(line["event"], line["step"]) for line in lines(tmp_path / "run")] == [
        ("train", 1), ("skipped", 2), ("train", 3), ("held_out", 3),
    ]  # fmt: skip
    assert lines(tmp_path / "run")[1]["grad_norm"] == "inf"
    assert state_of(tmp_path / "run", config).ema.step == 2


def test_too_many_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_recipe(tmp_path, "guard.max_skipped=2", "checkpoint.every=3")
    run = tmp_path / "run"
    poison(monkeypatch, {1, 2, 5, 6, 7})
    with pytest.raises(FloatingPointError) as caught:
        loop.train(config, run, quiet=True)
    assert str(caught.value) == (
        "step 7: the loss or the gradient was not finite for 3 steps in a row, and guard.max_skipped is 2; "
        f"their samples are in {run / 'nonfinite.json'}"
    )
    assert json.loads((run / "nonfinite.json").read_text()) == [
        {"step": step, "samples": samples(config, step)} for step in (5, 6, 7)
    ]
    assert [line["skipped"] for line in lines(run) if line["event"] == "skipped"] == [1, 2, 3, 4, 5]
    # The last checkpoint is before all that, and is what the run goes on from, into the same wall.
    assert state_of(run, config).step == 6
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 steps in a row"):
        loop.train(config, run, quiet=True)
    monkeypatch.undo()
    loop.train(config, run, quiet=True)


def test_skips_survive_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_recipe(tmp_path, "checkpoint.every=3")
    poison(monkeypatch, {2, 3, 4, 8})
    loop.train(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        honest = loop.training_batch
        patch.setattr(loop, "training_batch", lambda c, d, s, *share: honest(c, d, s, *share) if s < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(config, tmp_path / "run", quiet=True)
    loop.train(config, tmp_path / "run", quiet=True)
    assert outcome(tmp_path / "run", config) == outcome(tmp_path / "whole", config)
    assert state_of(tmp_path / "run", config).skipped == 4


def test_a_run_that_stops_keeps_the_model_of_its_last_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_recipe(tmp_path, "guard.max_skipped=0")
    poison(monkeypatch, {8})
    with pytest.raises(FloatingPointError):
        loop.train(config, tmp_path / "run", quiet=True)
    (line,) = [line for line in lines(tmp_path / "run") if line["event"] == "held_out"]
    assert line["step"] == 5
    model = PixelFlowEngine.from_pretrained(tmp_path / "run" / "model").model
    _, held_out = load_digits(config.data, config.resolution, config.model.in_channels)
    losses = loop.held_out_loss(model, list(loop.held_out_batches(config, held_out)), 2)
    assert losses == pytest.approx(line["stage_loss"])


# --- spikes ------------------------------------------------------------------------------------------------


def test_spikes_are_told_by_stage() -> None:
    history = LossHistory(3, factor=3.0)
    for _ in range(ENOUGH - 1):
        assert history.add([1.0, 10.0, None]) == []
    assert history.add([100.0, 10.0, None]) == []  # too early to tell
    assert history.add([3.0, 30.5, 50.0]) == [Spike(1, 30.5, 10.0)]  # three times as much is not above it
    assert history.add([3.1, 10.0, 1e9]) == [Spike(0, 3.1, 1.0)]  # the third stage is new


def test_a_median_is_of_the_last_losses() -> None:
    generator = random.Random(5)
    history, seen = LossHistory(1, factor=2.0), []
    for _ in range(4 * WINDOW):
        loss = generator.expovariate(1.0)
        median = statistics.median(seen[-WINDOW:]) if len(seen) >= ENOUGH else math.inf
        assert history.add([loss]) == ([Spike(0, loss, median)] if loss > 2 * median else [])
        seen.append(loss)
    copy = LossHistory(1, factor=2.0)
    copy.load(history.tensor())
    assert copy.tensor().tolist() == history.tensor().tolist() == [seen[-WINDOW:]]
    assert copy.add([100.0]) == history.add([100.0]) != []


def test_a_spike_is_logged_with_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_recipe(tmp_path, f"steps={ENOUGH + 3}", "log_every=100", "eval_every=100", "checkpoint.every=100")
    poison(monkeypatch, {ENOUGH + 2}, 1e3)
    loop.train(config, tmp_path / "run", quiet=True)
    (spike,) = [line for line in lines(tmp_path / "run") if line["event"] == "spike"]
    assert (spike["step"], spike["stage"]) == (ENOUGH + 2, 1)
    assert spike["loss"] > 3 * spike["median"] > 0

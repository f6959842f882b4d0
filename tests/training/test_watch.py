"""What is seen of a run: its speed, its operations, its bar, and numbers that are not finite."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixelflow_engine import flops
from pixelflow_training import loop, watch
from pixelflow_training.checkpoint import Checkpointer
from pixelflow_training.config import TrainConfig
from pixelflow_training.curves import read_curves
from pixelflow_training.ranks import ALONE, Ranks
from pixelflow_training.run import Silence
from pixelflow_training.state import TrainState
from pixelflow_training.step import Stepped, TrainStep
from pixelflow_training.watch import Watch, peak_of, summary
from support.recipes import tiny_recipe

DONE = Stepped(loss=0.5, stage_loss=[0.75, None, 0.25], norm=1.0, tokens=80)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time as a number to be moved by hand."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def events(path: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


class Lines(Silence):
    """A log in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.lines.append(record)


def watched(config: TrainConfig, ranks: Ranks = ALONE) -> tuple[TrainState, Watch, list[dict[str, Any]]]:
    state, log = TrainState(config, loop.build_model(config)), Lines()
    return state, Watch(config, state, log, ranks, quiet=True), log.lines


def of_two_stages(tokens: int = 80) -> Stepped:
    return replace(DONE, stage_loss=[0.75, 0.25], tokens=tokens)


def test_speed_is_over_all_steps_since_the_last_line(tmp_path: Path, clock: SimpleNamespace) -> None:
    config = tiny_recipe(tmp_path, "log_every=2")
    state, seen, lines = watched(config)
    for _ in range(4):
        clock.seconds += 0.5
        state.step += 1
        seen.step(of_two_stages(), lr=0.1)
        with seen.pause():
            clock.seconds += 10
    first, second = lines
    # Two steps of eight images in a second: four of 4 tokens and four of 16 each.
    assert (first["images_per_second"], first["tokens_per_second"]) == (16, 160)
    expected = 2 * flops.count(config.model, [16, 16, 16, 16, 4, 4, 4, 4]).training
    assert first["flops_per_second"] == pytest.approx(expected, rel=1e-12)
    assert {key: second[key] for key in second if key.endswith("_per_second")} == pytest.approx(
        {key: first[key] for key in first if key.endswith("_per_second")}
    )
    assert (first["seconds"], second["seconds"]) == (11, 32), "the run's own time goes on in pauses"
    assert "mfu" not in first, "a CPU has no peak"


def test_operations_follow_the_shape_of_each_step(tmp_path: Path, clock: SimpleNamespace) -> None:
    """Nine images of two stages: five of one and four of the other, by turns."""
    config = tiny_recipe(tmp_path, "batch_size=9")
    state, seen, lines = watched(config)
    for _ in range(2):
        clock.seconds += 1
        state.step += 1
        seen.step(of_two_stages(), lr=0.1)
    small, large = ([16] * 4 + [4] * 5, [16] * 5 + [4] * 4)
    assert [line["flops_per_second"] for line in lines] == [
        flops.count(config.model, lengths).training for lengths in (small, large)
    ]


def test_utilization_is_of_all_devices_in_their_type(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = tiny_recipe(tmp_path, "compute.dtype=bfloat16")
    cuda = Ranks(0, 4, torch.device("cuda", 0))
    assert peak_of(config, cuda.device) == 989.4e12
    assert peak_of(tiny_recipe(tmp_path), cuda.device) is None, "float32 is not what the peak is of"
    assert peak_of(config, ALONE.device) is None
    state, seen, lines = watched(config, cuda)
    clock.seconds += 2
    state.step += 1
    seen.step(of_two_stages(), lr=0.1)
    (line,) = lines
    assert line["mfu"] == pytest.approx(line["flops_per_second"] / (4 * 989.4e12), rel=1e-12)


def test_saves_evaluations_and_pictures_are_not_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: a step takes a second, and everything else a hundred."""
    now = SimpleNamespace(seconds=0.0)

    def advancing(work: Any, seconds: float) -> Any:
        def timed(*arguments: Any) -> Any:
            now.seconds += seconds
            return work(*arguments)

        return timed

    monkeypatch.setattr(TrainStep, "begin", advancing(TrainStep.begin, 1.0))
    monkeypatch.setattr(loop, "held_out_loss", advancing(loop.held_out_loss, 100.0))
    monkeypatch.setattr(loop, "save_samples", advancing(lambda *_: {"file": "samples/none.png", "failed": 0}, 100.0))
    monkeypatch.setattr(Checkpointer, "save", advancing(Checkpointer.save, 100.0))
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    overrides = ["log_every=4", "eval_every=3", "steps=8", "checkpoint.every=2", "samples.every=5"]
    loop.train(tiny_recipe(tmp_path, *overrides), tmp_path / "run", quiet=True)
    lines = events(tmp_path / "run" / "log.jsonl")
    assert [line["images_per_second"] for line in lines] == [8.0, 8.0]
    # Until the eighth step: eight seconds, saves of steps 2, 4 and 6, two evaluations and a picture.
    assert lines[-1]["seconds"] == 8 + 3 * 100 + 2 * 100 + 100


def test_the_bar_says_what_the_line_says() -> None:
    speed = {"images_per_second": 812.0, "tokens_per_second": 81_200.0, "flops_per_second": 1.25e12}
    said = summary(DONE, speed)
    assert said == "loss 0.5000 (0.750 - 0.250), 812 images/s, 81.2k tokens/s, 1.25TFLOP/s"
    assert summary(DONE, speed | {"mfu": 0.3912}) == said + ", MFU 39.1%"


def test_a_run_draws_its_bar(tmp_path: Path) -> None:
    drawn = io.StringIO()
    with redirect_stderr(drawn):
        loop.train(tiny_recipe(tmp_path, "steps=2", "data.held_out=10"), tmp_path / "run")
    last = drawn.getvalue().rstrip().rpartition("\r")[2]
    assert last.startswith("2/2 |")
    assert "images/s" in drawn.getvalue()
    assert "FLOP/s" in drawn.getvalue()


def test_a_held_out_loss_that_is_not_finite_is_told_and_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank alone writes it: an error there would leave the others waiting."""
    honest = loop.held_out_batches

    def poisoned(*arguments: Any) -> Any:
        for batch in honest(*arguments):
            tokens = batch.tokens.clone()
            tokens[0, 0] = torch.nan  # of an image of full resolution
            yield replace(batch, tokens=tokens)

    monkeypatch.setattr(loop, "held_out_batches", poisoned)
    loop.train(tiny_recipe(tmp_path, "steps=2", "data.held_out=10"), tmp_path / "run", quiet=True)
    (line,) = events(tmp_path / "run" / "log.jsonl", "held_out")
    assert line["stage_loss"][1] == "nan"
    assert 0 < line["stage_loss"][0] < 100
    curves = read_curves(tmp_path / "run", "run")
    assert [len(curve) for curve in curves.held_out] == [1, 0]
    assert [len(curve) for curve in curves.training] == [2, 2]

"""A step's batch is made during the step before: once, in order, and its errors come when it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixelflow_training import loop
from pixelflow_training.ahead import Ahead
from pixelflow_training.config import TrainConfig
from pixelflow_training.step import TrainStep
from support.recipes import tiny_recipe
from support.runs import outcome, state_of


def test_each_batch_is_made_once_and_in_order() -> None:
    made: list[int] = []
    ahead = Ahead(lambda step: made.append(step) or f"batch {step}", 3)  # type: ignore[arg-type, func-returns-value]
    taken = []
    for step in range(3):
        taken.append(ahead.take(step))
        ahead.prepare(step + 1)
        assert made == [*range(min(step + 2, 3))]
    assert taken == ["batch 0", "batch 1", "batch 2"]


def test_errors_are_raised_by_who_takes_it() -> None:
    def fails(step: int) -> Any:
        raise OSError(f"no images for step {step}")

    ahead = Ahead(fails, 3)
    ahead.prepare(1)
    with pytest.raises(OSError, match="no images for step 1"):
        ahead.take(1)
    with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C does not wait
        Ahead(lambda step: (_ for _ in ()).throw(KeyboardInterrupt), 3).prepare(1)


def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What training does, in its order."""
    found: list[str] = []

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def does(*arguments: Any, **options: Any) -> Any:
            found.append(name)
            return work(*arguments, **options)

        return does

    monkeypatch.setattr(loop, "training_batch", noted("batch", loop.training_batch))
    for name in ("begin", "finish"):
        monkeypatch.setattr(TrainStep, name, noted(name, getattr(TrainStep, name)))
    return found


def test_training_makes_the_next_batch_before_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = events(monkeypatch)
    loop.train(tiny_recipe(tmp_path, "steps=3"), tmp_path / "run", quiet=True)
    assert found == ["batch", *["begin", "batch", "finish"] * 2, "begin", "finish"]


def test_a_step_is_completed_and_saved_though_the_next_batch_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_recipe(tmp_path, "checkpoint.every=2", "eval_every=2", "steps=6")
    loop.train(config, tmp_path / "whole", quiet=True)
    honest = loop.training_batch

    def fails(config: TrainConfig, data: Any, step: int, *share: int) -> Any:
        if step == 4:
            raise OSError("no images")
        return honest(config, data, step, *share)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_batch", fails)
        with pytest.raises(OSError, match="no images"):
            loop.train(config, tmp_path / "run", quiet=True)
    assert state_of(tmp_path / "run", config).step == 4
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert [(line["event"], line["step"]) for line in log][-2:] == [("train", 4), ("held_out", 4)]
    loop.train(config, tmp_path / "run", quiet=True)
    assert outcome(tmp_path / "run", config) == outcome(tmp_path / "whole", config)

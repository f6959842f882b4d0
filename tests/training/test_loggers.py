"""TensorBoard is told what the log says, once, however often a run goes on: a stand-in, and itself where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixelflow_engine.errors import ConfigError
from pixelflow_training import loop
from pixelflow_training.config import TrainConfig
from pixelflow_training.loggers import TensorBoard, scalars
from pixelflow_training.run import RunDirectory
from support.recipes import tiny_recipe
from support.runs import digest, state_of

OVERRIDES = ["steps=4", "data.held_out=10", "eval_every=2", "checkpoint.every=1", "checkpoint.keep=9"]
TOLD = [*OVERRIDES, "loggers=[tensorboard]", "samples.every=2", "samples.rows=1", "samples.steps=[1]"]


class Writer:
    """torch's ``SummaryWriter``, as lines of JSON in a file of its kind of name."""

    written = 0

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(exist_ok=True)
        Writer.written += 1
        self.path = Path(log_dir) / f"events.out.tfevents.{Writer.written}"
        self.path.touch()
        self.lines: list[list[Any]] = []

    def add_scalar(self, tag: str, value: float, step: int, walltime: float) -> None:
        assert isinstance(value, float | int)
        self.lines.append([tag, step, value, walltime])

    def add_image(self, tag: str, pixels: np.ndarray, step: int, walltime: float, dataformats: str) -> None:
        assert (dataformats, pixels.dtype, pixels.shape[2]) == ("HWC", np.uint8, 3)
        self.lines.append([tag, step, int(pixels.sum()), walltime])

    def close(self) -> None:
        self.path.write_text(json.dumps(self.lines))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[list[Any]]]:
    """What the files of a run say: ``[tag, step, value, walltime]``, in order."""
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return lambda run: [
        line for path in sorted((run / "tensorboard").iterdir()) for line in json.loads(path.read_text())
    ]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def expected(run: Path) -> list[list[Any]]:
    """Of the log, line by line."""
    found = []
    for record in records(run):
        step = record["step"]
        if record["event"] == "samples":
            with Image.open(run / record["file"]) as image:
                found.append(["samples", step, int(np.asarray(image.convert("RGB")).sum())])
        if record["event"] == "train":
            found.append(["loss", step, record["loss"]])
            found += [[f"loss/stage {s}", step, loss] for s, loss in enumerate(record["stage_loss"])]
            names = ("grad_norm", "lr", "images_per_second", "tokens_per_second", "flops_per_second")
            found += [[name, step, record[name]] for name in names]
        if record["event"] == "held_out":
            found += [[f"held_out/stage {s}", step, loss] for s, loss in enumerate(record["stage_loss"])]
    return found


def test_a_run_tells_its_log_once_however_often_it_goes_on(
    told: Callable[[Path], list[list[Any]]], tmp_path: Path
) -> None:
    config, run = tiny_recipe(tmp_path, *TOLD), tmp_path / "run"
    loop.train(config, run, quiet=True)
    assert [line[:3] for line in told(run)] == expected(run)
    kept = run / "tensorboard" / "notes.txt"
    kept.write_text("[]")  # not ours
    loop.train(config, run, quiet=True, from_step=1)
    lines = told(run)
    assert [line[:3] for line in lines] == expected(run)
    assert len({(tag, step) for tag, step, *_ in lines}) == len(lines)
    assert kept.exists()
    # Dated by the run's own time, which a stop does not count in.
    dates = [when for *_, when in lines]
    assert dates == sorted(dates)
    train = [record for record in records(run) if record["event"] == "train"]
    losses = [when for tag, _, _, when in lines if tag == "loss"]
    # Dates are seconds since 1970 in float64, which resolves a quarter of a microsecond.
    assert np.diff(losses) == pytest.approx(np.diff([record["seconds"] for record in train]), abs=1e-6)


def test_who_is_told_changes_no_bit(told: Callable[[Path], list[list[Any]]], tmp_path: Path) -> None:
    config, plain = tiny_recipe(tmp_path, *TOLD), tiny_recipe(tmp_path, *OVERRIDES)
    loop.train(plain, tmp_path / "plain", quiet=True)
    loop.train(config, tmp_path / "plain", quiet=True, from_step=2)  # a logger may come later
    assert {step for tag, step, *_ in told(tmp_path / "plain") if tag == "loss"} == {1, 2, 3, 4}
    loop.train(config, tmp_path / "run", quiet=True)
    states = [digest(state_of(tmp_path / name, config).tensors()) for name in ("plain", "run")]
    assert states[0] == states[1]


def test_what_is_not_finite_is_a_number_there() -> None:
    line = {"event": "held_out", "step": 3, "stage_loss": [0.5, "nan", None]}
    assert str(scalars(line)) == "{'held_out/stage 0': 0.5, 'held_out/stage 1': nan}"
    assert scalars({"event": "skipped", "step": 3, "skipped": 2, "loss": "nan"}) == {"skipped": 2}
    assert scalars({"event": "spike", "step": 3, "stage": 1, "loss": 9.0, "median": 1.0}) == {"spike/stage 1": 9.0}
    assert scalars({"event": "skipped_image", "step": 3, "name": "a", "reason": "b"}) == {}


def test_a_picture_that_is_gone_is_passed_over(told: Callable[[Path], list[list[Any]]], tmp_path: Path) -> None:
    board = TensorBoard(RunDirectory(tmp_path), seconds=0.0)
    board.write({"event": "samples", "step": 2, "file": "samples/step-00000002.png", "failed": 0})
    board.close()
    assert told(tmp_path) == []


def test_without_tensorboard_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="loggers: tensorboard is not installed: the extra `tensorboard` has it"):
        loop.train(tiny_recipe(tmp_path, *TOLD), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_an_unknown_logger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loggers\[0\]: got 'wandb', expected one of tensorboard"):
        tiny_recipe(tmp_path, "loggers=[wandb]")


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    """The real thing, where it is installed: two goings-on, and every number once."""
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config: TrainConfig = tiny_recipe(tmp_path, *TOLD)
    run = tmp_path / "run"
    loop.train(config, run, quiet=True)
    loop.train(config, run, quiet=True, from_step=1)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    found = [[tag, event.step, event.value] for tag in board.Tags()["scalars"] for event in board.Scalars(tag)]
    numbers = [line for line in expected(run) if line[0] != "samples"]
    # Event files hold float32.
    assert sorted(found) == sorted([tag, step, float(np.float32(value))] for tag, step, value in numbers)
    assert [event.step for event in board.Images("samples")] == [2, 4]

"""Pictures of a run: what the engine samples from its averaged weights, and nothing else of the run changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.errors import ConfigError
from pixelflow_engine.output import to_uint8
from pixelflow_training import loop, samples
from pixelflow_training.config import TrainConfig
from pixelflow_training.run import RunDirectory
from pixelflow_training.samples import columns_of, sample_sheet
from support.recipes import tiny_recipe
from support.runs import digest, state_of

OVERRIDES = ["steps=6", "data.held_out=10", "checkpoint.every=2", "eval_every=2"]
PICTURES = ["samples.every=4", "samples.labels=[3, 10]", "samples.rows=2", "samples.steps=[2, 3]", "samples.seed=5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    folder = tmp_path_factory.mktemp("with pictures")
    config = tiny_recipe(folder, *OVERRIDES, *PICTURES)
    loop.train(config, folder / "run", quiet=True)
    return config, folder / "run"


def cells(picture: Path, columns: int, side: int, zoom: int) -> list[NDArray[np.uint8]]:
    """The images of a picture, row by row, as they were sampled."""
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    pitch = side * zoom + 2
    rows = (pixels.shape[0] - 2) // pitch
    assert pixels.shape[:2] == (2 + rows * pitch, 2 + columns * pitch)
    corners = [(2 + row * pitch, 2 + column * pitch) for row in range(rows) for column in range(columns)]
    return [pixels[top : top + side * zoom : zoom, left : left + side * zoom : zoom] for top, left in corners]


def lines(run: Path, without: str = "") -> list[dict[str, object]]:
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [record for record in records if record["event"] != without]
    return [{key: r[key] for key in r if key != "seconds" and not key.endswith("_second")} for r in kept]


def test_a_picture_holds_what_the_engine_samples_from_the_model_of_its_step(run: tuple[TrainConfig, Path]) -> None:
    """The last one's step has been evaluated too: its weights are in ``model``."""
    _, folder = run
    engine = PixelFlowEngine.from_pretrained(folder)
    found = cells(folder / "samples" / "step-00000006.png", columns=2, side=16, zoom=4)
    assert len(found) == 4
    for place, (row, label) in enumerate([(0, 3), (0, 10), (1, 3), (1, 10)]):
        # A row is a batch: an image's last bits may depend on its place in one.
        seeds = [5 + 2 * row, 6 + 2 * row]
        images = engine([3, 10], num_inference_steps=[2, 3], seed=seeds, output_type="np").images
        expected = to_uint8(np.asarray(images))[place % 2]
        assert np.array_equal(found[place], expected), (row, label)
    assert len({cell.tobytes() for cell in found}) == 4


def test_a_run_has_the_bits_that_it_has_without_pictures(run: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, folder = run
    stream = torch.get_rng_state()
    plain = tiny_recipe(tmp_path, *OVERRIDES)
    loop.train(plain, tmp_path / "run", quiet=True)
    assert torch.equal(torch.get_rng_state(), stream)
    assert digest(state_of(folder, config).tensors()) == digest(state_of(tmp_path / "run", plain).tensors())
    assert lines(folder, "samples") == lines(tmp_path / "run")
    assert [record for record in lines(folder) if record["event"] == "samples"] == [
        {"event": "samples", "step": step, "file": f"samples/step-0000000{step}.png", "failed": 0} for step in (4, 6)
    ]
    assert not (tmp_path / "run" / "samples").exists()


def test_a_run_that_goes_on_makes_the_same_pictures(run: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, folder = run
    loop.train(config, tmp_path / "run", quiet=True)
    stale = tmp_path / "run" / "samples" / "step-00000005.png"
    stale.write_bytes(b"of a time that is given up")
    loop.train(config, tmp_path / "run", quiet=True, from_step=4)
    assert not stale.exists()
    names = {"step-00000004.png", "step-00000006.png"}
    for output in (folder, tmp_path / "run"):
        assert {path.name for path in (output / "samples").iterdir()} == names
    for name in names:
        assert (tmp_path / "run" / "samples" / name).read_bytes() == (folder / "samples" / name).read_bytes()
    assert lines(tmp_path / "run") == lines(folder)


def test_later_pictures_are_deleted_by_their_step(tmp_path: Path) -> None:
    """Steps of nine digits are later than those of eight, and come earlier in the order of the alphabet."""
    directory = RunDirectory(tmp_path)
    steps = [99_999_998, 99_999_999, 100_000_000, 100_000_001]
    directory.sample_path(0).parent.mkdir()
    for step in steps:
        directory.sample_path(step).touch()
    mine = directory.sample_path(0).with_name("step-by-step.png")
    mine.touch()
    for step, kept in ((100_000_000, 3), (99_999_998, 1)):
        with directory.open_log(step):
            pass
        left = {directory.sample_path(step) for step in steps[:kept]} | {mine}
        assert set(mine.parent.iterdir()) == left


def test_weights_are_left_alone_and_images_that_fail_are_counted(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "samples.rows=1", "samples.steps=[2]", "samples.labels=[1, 2, 3]")
    weights = loop.build_model(config).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    _, failed = sample_sheet(config, weights, torch.device("cpu"))
    assert failed == 0
    assert all(torch.equal(weights[name], before[name]) for name in before)
    weights["class_embedder.embedding_table.weight"][2] = torch.nan
    weights["proj_out_1.weight"].fill_(1)  # fresh, it is zero, and so is all that comes of it
    picture, failed = sample_sheet(config, weights, torch.device("cpu"))
    assert failed == 1
    assert np.asarray(picture).ndim == 2


def test_a_picture_without_memory_does_not_end_the_training(
    run: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config, never = run
    monkeypatch.setattr(samples, "sample_sheet", full)
    loop.train(config, tmp_path / "run", quiet=True)
    told = [line for line in lines(tmp_path / "run") if line["event"] == "samples"]
    assert told == [{"event": "samples", "step": step, "reason": "CUDA out of memory"} for step in (4, 6)]
    assert digest(state_of(tmp_path / "run", config).tensors()) == digest(state_of(never, config).tensors())


def test_a_model_without_classes_fills_its_columns(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "model.num_classes=0", "samples.rows=1", "samples.steps=[1]")
    picture, _ = sample_sheet(config, loop.build_model(config).state_dict(), torch.device("cpu"))
    picture.save(tmp_path / "sheet.png")
    assert len({cell.tobytes() for cell in cells(tmp_path / "sheet.png", columns=10, side=16, zoom=4)}) == 10


@pytest.mark.parametrize(
    ("classes", "columns"),
    [(1, [0]), (3, [0, 1, 2]), (10, list(range(10))), (1000, list(range(0, 1000, 100)))],
)
def test_labels_are_evenly_apart(classes: int, columns: list[int], tmp_path: Path) -> None:
    assert columns_of(tiny_recipe(tmp_path, f"model.num_classes={classes}")) == columns


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["samples.every=0"], "samples.every: got 0"),
        (["samples.rows=0"], "samples.rows: got 0"),
        (["samples.steps=[0]"], "samples.steps: got 0"),
        (["samples.steps=[1, 2, 3]"], "samples.steps: got 3 numbers, expected one, or 2"),
        (["samples.labels=[11]"], "samples.labels: got [11], expected numbers from 0 to 10"),
        (["samples.labels=[]"], "samples.labels: got []"),
        (["samples.labels=[0]", "model.num_classes=0"], "expected none for a model without classes"),
        (["samples.seed=-1"], "samples.seed: got -1"),
        (["samples.columns=3"], "unknown keys columns"),
        (["samples.steps=[2000000]"], "samples.steps: got 2000000, expected at most 1000000"),
        (["samples.every=2", "model.in_channels=5", "model.out_channels=5"], "samples.every: got 2, expected null for"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_with_the_recipe(overrides: list[str], said: str, tmp_path: Path) -> None:
    refused: Callable[..., TrainConfig] = tiny_recipe
    with pytest.raises(ConfigError) as caught:
        refused(tmp_path, *overrides)
    assert said in str(caught.value)

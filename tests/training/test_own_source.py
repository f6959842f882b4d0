"""Training on a source of one's own, as the example does, and what is wrong with such a source."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pixelflow_training
from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.errors import ConfigError
from pixelflow_training import UnreadableImageError, train
from pixelflow_training.manifest import read_manifest
from support.recipes import tiny_recipe
from support.runs import lines

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_source.py"
SHORT = ["data.held_out=8", "eval_every=100", "optimizer.schedule=constant", "log_every=100"]


class Noise:
    """Random images of ten classes."""

    def __init__(self, count: int = 40, **changes: Any) -> None:
        self.labels: Any = torch.arange(count) % 10
        vars(self).update(changes)

    def name(self, sample: int) -> str:
        return f"noise {sample}"

    def load(self, sample: int) -> Tensor:
        return torch.randint(0, 256, (1, 20, 20), generator=torch.Generator().manual_seed(sample), dtype=torch.uint8)


def test_every_public_name_is_there() -> None:
    for name in pixelflow_training.__all__:
        assert name in dir(pixelflow_training)
        assert getattr(pixelflow_training, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pixelflow_training.nothing  # noqa: B018


def run_example(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_example(tmp_path: Path) -> None:
    """As a reader runs it: with workers, again to go on, and its model samples."""
    run = tmp_path / "new" / "shapes"
    small = ("batch_size=4", "eval_every=2", "optimizer.schedule=constant")
    begun = run_example(run, *small, "steps=2", "data.workers=1")
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout == f"wrote {run}/model\n"
    assert f"{run} begins: 1,984 images to train on, 64 held out, 2 classes; to step 2\n" in begun.stderr
    assert json.loads((run / "classes.json").read_text()) == {"0": "square", "1": "disc"}
    again = run_example(run, *small, "steps=3")
    assert f"{run} goes on after step 2: " in again.stderr
    assert [line["step"] for line in lines(run) if line["event"] == "held_out"] == [2, 3]
    images = PixelFlowEngine.from_pretrained(run)([0, 1], num_inference_steps=1, output_type="pt").images
    assert images.shape == (2, 1, 32, 32)  # type: ignore[union-attr]


def test_the_example_says_how_it_is_run() -> None:
    ran = run_example()
    assert ran.returncode == 1
    assert "python examples/own_source.py runs/shapes" in ran.stderr


@pytest.mark.parametrize("begins", ["digits", "own"])
def test_a_run_does_not_go_on_with_the_images_of_another_source(begins: str, tmp_path: Path) -> None:
    sources = {"digits": None, "own": Noise()}
    (goes_on,) = {*sources} - {begins}
    run = tmp_path / "run"
    train(tiny_recipe(tmp_path, *SHORT, "steps=1"), run, True, source=sources[begins])
    longer = tiny_recipe(tmp_path, *SHORT, "steps=2")
    known = {"digits": "scikit-learn's digits", "own": "labels"}
    with pytest.raises(ConfigError, match="written with other images: ") as caught:
        train(longer, run, True, source=sources[goes_on])
    assert f"{known[begins]} is missing" in str(caught.value)
    assert f"{known[goes_on]} is new" in str(caught.value)
    train(longer, run, True, source=sources[begins])
    for step in (1, 2):
        data = read_manifest(run / "checkpoints" / f"step-{step:08d}").data
        assert data is not None
        assert [*data] == [known[begins]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Noise(labels=[0, 1, 2]), r"labels: got list, expected a tensor, torch\.int64 \[N\]"),
        (Noise(labels=torch.arange(40.0)), r"labels: got torch\.float32 \[40\], expected torch\.int64 \[N\]"),
        (Noise(labels=torch.arange(40)), "labels: got 0 to 39, expected 0 to 9"),
        (Noise(classes=10), "classes: got 10, expected a list or tuple of names"),
        (Noise(classes="ab"), "classes: got 'ab', expected a list"),
        (Noise(classes=["a", "b"]), r"classes: got 2 names, expected 10: model\.num_classes"),
        (
            Noise(load=lambda sample: [sample]),
            r"image noise \d+: got list, expected a tensor, torch\.uint8 \[1, H, W\]",
        ),
        (Noise(load=lambda sample: torch.zeros(1, 8, 8)), r"image noise \d+: got torch\.float32 \[1, 8, 8\]"),
    ],
    ids=["a list", "floats", "too large", "a number", "a text", "class names", "no tensor", "no bytes"],
)
def test_what_is_wrong_with_a_source_is_named(source: Noise, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        train(tiny_recipe(tmp_path, *SHORT, "steps=1"), tmp_path / "run", True, source=source)


def test_an_error_of_load_says_which_image(tmp_path: Path) -> None:
    def fail(sample: int) -> Tensor:
        raise KeyError("missing column")

    with pytest.raises(KeyError, match="missing column") as caught:
        train(tiny_recipe(tmp_path, *SHORT, "steps=1"), tmp_path / "run", True, source=Noise(load=fail))
    (note,) = caught.value.__notes__
    assert note.startswith("while image noise ")


def test_an_image_that_cannot_be_read_has_no_note(tmp_path: Path) -> None:
    """It is replaced, and the log has its name and reason already."""

    def skip(sample: int) -> Tensor:
        if sample % 4 == 0:
            raise UnreadableImageError("every fourth")
        return Noise().load(sample)

    recipe = tiny_recipe(tmp_path, *SHORT, "steps=2", "data.max_skipped=20")
    train(recipe, tmp_path / "run", True, source=Noise(load=skip))
    reasons = [line["reason"] for line in lines(tmp_path / "run") if line["event"] == "skipped_image"]
    assert reasons
    assert {*reasons} == {"every fourth"}


def test_workers_of_a_program_without_a_guard(tmp_path: Path) -> None:
    """Each worker would train; multiprocessing ends it instead, and the error says what is missing."""
    program = tmp_path / "unguarded.py"
    program.write_text(
        "from pathlib import Path\n"
        "from pixelflow_training import train\n"
        "from support.recipes import tiny_recipe\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "train(tiny_recipe(folder, 'steps=2', 'data.workers=1'), folder / 'run', True)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode != 0
    assert "ChildProcessError: step 0: a process that reads images has ended unexpectedly: " in ran.stderr
    assert 'must do so under `if __name__ == "__main__":`' in ran.stderr.splitlines()[-1]

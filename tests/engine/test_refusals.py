"""What a refused checkpoint says, and how soon: no file rewrites a terminal or keeps a reader busy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pixelflow_engine.checkpoint import convert, load_checkpoint, save_checkpoint, save_training_checkpoint
from pixelflow_engine.checkpoint.problems import listed
from pixelflow_engine.checkpoint.text import LARGEST_CONFIG, parse_json
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError

CONFIG = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=1, attention_head_dim=4, depth=1, num_classes=3),
    scheduler=SchedulerConfig(num_stages=2),
    resolution=16,
)
WEIGHTS = {name: torch.zeros(shape) for name, shape in parameter_shapes(CONFIG.model).items()}
CLEARS_THE_SCREEN = "\x1b[2J"


@pytest.fixture
def public(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "ours", CONFIG, WEIGHTS)
    convert(tmp_path / "ours", tmp_path / "public", to="public")
    return tmp_path / "public"


def message_of(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint)
    return str(caught.value)


def test_names_from_a_file_are_printable_in_messages(public: Path) -> None:
    good = (public / "config.yaml").read_text()
    (public / "config.yaml").write_text(good + '"\\e[2J": 1\n')
    assert "unknown keys \\x1b[2J;" in (told := message_of(public))
    assert told.isprintable()
    (public / "config.yaml").write_text(good)
    torch.save(WEIGHTS | {CLEARS_THE_SCREEN: torch.zeros(1)}, public / "model.pt")
    assert "not part of the model: \\x1b[2J" in (told := message_of(public))
    assert told.isprintable()


def test_lone_surrogates_can_be_written_to_a_log() -> None:
    assert listed(["a\ud800", "\N{GREEK SMALL LETTER ALPHA}"]) == "a\\ud800, \N{GREEK SMALL LETTER ALPHA}"
    with pytest.raises(CheckpointError) as caught:
        parse_json(b'{"\\ud800": 1, "\\ud800": 2}', Path("config.json"))
    assert str(caught.value).encode()


@pytest.mark.parametrize("text", [b'"' + b'\\"' * LARGEST_CONFIG, b'"' * LARGEST_CONFIG, b"\\" * LARGEST_CONFIG])
def test_json_is_read_once(text: bytes) -> None:
    """The largest file takes milliseconds; reading the rest anew at every quote took 14 seconds."""
    began = time.process_time()
    with pytest.raises(CheckpointError):
        parse_json(text[:LARGEST_CONFIG], Path("config.json"))
    assert time.process_time() - began < 3


@pytest.mark.parametrize("text", [b'{"a": "[[[' + b"[" * 40 + b'"}', b'{"\\"[": "' + b"\\\\" * 40 + b'"}'])
def test_brackets_in_strings_are_no_depth(text: bytes) -> None:
    assert parse_json(text, Path("config.json"))


@pytest.mark.parametrize("destination", ["", None, 3])
def test_a_destination_that_is_no_path_is_refused(
    destination: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty text was the working directory, which ``overwrite`` replaced."""
    save_checkpoint(tmp_path / "ours", CONFIG, WEIGHTS)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    expected = "expected the path of a folder to write"
    with pytest.raises(CheckpointError, match=expected):
        save_checkpoint(destination, CONFIG, WEIGHTS, overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=expected):
        save_training_checkpoint(destination, CONFIG, WEIGHTS, WEIGHTS, 1, overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=expected):
        convert(tmp_path / "ours", destination, overwrite=True)  # type: ignore[arg-type]
    assert not list((tmp_path / "empty").iterdir())


def test_a_destination_that_exists_is_refused_before_the_weights_are_read(public: Path) -> None:
    ours = public.with_name("ours")
    with (public / "model.pt").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="exists already, and overwrite"):
        convert(public, ours)
    (ours / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"also holds notes\.txt"):
        convert(public, ours, overwrite=True)

"""What two ranks make is seen once: log and picture are the first one's; with fewer held-out images than ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelflow_engine import PixelFlowEngine, load_checkpoint
from pixelflow_engine.output import to_uint8
from pixelflow_training.publish import publish
from support.ranks import FAILED, in_ranks, said, train
from support.recipes import tiny_recipe
from support.runs import digest

OVERRIDES = ["steps=2", "checkpoint.every=2", "eval_every=2", "data.held_out=1", "compute.max_tokens=40"]
PICTURES = ["samples.every=2", "samples.rows=1", "samples.labels=[4]", "samples.steps=[2]"]


def test_first_weights_that_are_not_there_stop_both(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    assert in_ranks(2, tmp_path, train, ["init_from=nowhere"]) == [FAILED, FAILED]
    for rank in (0, 1):
        assert "CheckpointError: nowhere: no such file or folder" in said(tmp_path, rank)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", [[], ["compute.shard=2"]], ids=["copies", "sharded"])
def test_two_ranks_are_seen_as_one(way: list[str], tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    overrides = [*OVERRIDES, *PICTURES, *way]
    assert in_ranks(2, tmp_path, train, overrides) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["event"], record["step"]) for record in records] == [
        ("train", 1), ("train", 2), ("held_out", 2), ("samples", 2),
    ]  # fmt: skip
    # One image is held out, of the stage that the draws give it; the other stage has none.
    assert sorted(loss is None for loss in records[2]["stage_loss"]) == [False, True]
    images = PixelFlowEngine.from_pretrained(run)([4], num_inference_steps=2, seed=0, output_type="np").images
    with Image.open(run / "samples" / "step-00000002.png") as picture:
        drawn = np.asarray(picture)[2:-2:4, 2:-2:4]
    assert np.array_equal(drawn, to_uint8(np.asarray(images))[0])
    # Weights that lie on two ranks are published whole by one process.
    published = load_checkpoint(publish(run, tmp_path / "out"))
    assert digest({"": published.state_dict}) == digest({"": load_checkpoint(run).state_dict})
    assert published.config == tiny_recipe(tmp_path, *overrides).network

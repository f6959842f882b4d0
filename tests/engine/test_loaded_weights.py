"""Weights that lie side by side are the model's: they are loaded, saved and counted as if they did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelflow_engine import PixelFlowEngine, load_checkpoint, save_checkpoint
from support.engines import tiny_config, tiny_model
from support.kernels import assert_same_bits
from support.recording import RecordingCapture, packed_engine

CALL = {"class_labels": [1, 2], "num_inference_steps": 2, "seed": 3, "output_type": "pt"}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_weights_loaded_into_an_engine_that_has_run(graphs: bool, patch_size: int) -> None:
    """Programs and graphs that were made before go on with the new weights, the patch embedding's copy included."""
    engine = packed_engine(RecordingCapture() if graphs else None, seed=1, patch_size=patch_size)
    before = engine(**CALL).images
    engine.model.load_state_dict(tiny_model(engine.config, seed=2).state_dict())
    found = engine(**CALL).images
    assert_same_bits(found, packed_engine(seed=2, patch_size=patch_size)(**CALL).images)
    assert not torch.equal(found, before)
    # One tensor alone: a copy that does not follow would show nothing else.
    with torch.no_grad():
        engine.model.patch_embed.proj.weight.copy_(tiny_model(engine.config, seed=5).patch_embed.proj.weight)
    assert not torch.equal(engine(**CALL).images, found)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_an_engine_made_without_autograd_is_called_with_it(patch_size: int) -> None:
    with torch.inference_mode():
        engine = packed_engine(seed=1, patch_size=patch_size)
    assert_same_bits(engine(**CALL).images, packed_engine(seed=1, patch_size=patch_size)(**CALL).images)


@pytest.mark.parametrize("to", ["checkpoint", "load"])
def test_a_model_side_by_side_is_saved_and_loaded(to: str, tmp_path: Path) -> None:
    config = tiny_config(depth=2)
    original = tiny_model(config).state_dict()
    engine = packed_engine(depth=2)
    assert engine.model.blocks[0].attn1.qkv is not None
    engine(**CALL)
    save_checkpoint(tmp_path / "model", engine.config, engine.model.state_dict())
    loaded = load_checkpoint(tmp_path / "model")
    assert list(loaded.state_dict) == list(original)
    for name, value in original.items():
        assert_same_bits(loaded.state_dict[name], value, name)
    if to == "checkpoint":
        again = PixelFlowEngine.from_checkpoint(loaded)
    else:
        again = PixelFlowEngine.from_pretrained(tmp_path / "model")
    assert again.exact
    assert_same_bits(again(**CALL).images, PixelFlowEngine(config, tiny_model(config))(**CALL).images)
    # Nothing that several names share is written twice.
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size < sum(value.nbytes for value in original.values()) + 40_000

"""A checkpoint as the published code writes it, with random weights: it loads, samples and equals the reference."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from pixelflow_engine import PixelFlowEngine, reference
from pixelflow_engine.cli import app
from support.reference_models import random_reference

CONFIG = """\
model:
  target: pixelflow.model.PixelFlowModel
  params:
    num_attention_heads: 2
    attention_head_dim: 72
    in_channels: 3
    out_channels: 3
    depth: 2
    num_classes: 10
    patch_size: 4
    attention_bias: true

scheduler:
  num_train_timesteps: 1000
  num_stages: 4
  pyramid_shift: false

train:
  lr: 1e-4
  weight_decay: 0.0
  epochs: 10

data:
  root: /data/train
  center_crop: false
  resolution: 64
  expand_ratio: 1.125
  num_workers: 4
  batch_size: 4

seed: 42
"""


def model(seed: int) -> reference.PixelFlowTransformer:
    return random_reference(seed, head_dim=72, patch_size=4, num_classes=10, dtype=torch.float32)


def reference_images(transformer: reference.PixelFlowTransformer) -> np.ndarray:
    torch.manual_seed(8)
    ends = reference.sample(
        transformer,
        shape=(2, 3, 64, 64),
        num_stages=4,
        num_inference_steps=[2] * 4,
        guidance=reference.guidance_weights(2.4, 4),
        noise=reference.PublicNoise(),
        class_labels=torch.tensor([3, 7]),
    )
    return reference.to_images(ends[-1]).numpy()


def test_a_published_folder_samples_what_the_reference_samples(tmp_path: Path) -> None:
    transformer = model(1)
    (tmp_path / "config.yaml").write_text(CONFIG)
    torch.save(transformer.state_dict(), tmp_path / "model.pt")
    engine = PixelFlowEngine.from_pretrained(tmp_path)
    out = engine([3, 7], num_inference_steps=2, noise="public", seed=8, output_type="np")
    assert np.array_equal(np.asarray(out.images), reference_images(transformer))


def test_a_training_checkpoint_samples_from_its_averaged_weights(tmp_path: Path) -> None:
    averaged, latest = model(1), model(2)
    (tmp_path / "config.yaml").write_text(CONFIG)
    torch.save(
        {
            "model": latest.state_dict(),
            "ema": averaged.state_dict(),
            "opt": torch.optim.AdamW(latest.parameters()).state_dict(),
            "args": argparse.Namespace(config="config.yaml", output_dir="exp", logging_steps=10),
        },
        tmp_path / "model_1000.pt",
    )
    for weights, transformer in (("auto", averaged), ("ema", averaged), ("model", latest)):
        engine = PixelFlowEngine.from_pretrained(tmp_path / "model_1000.pt", weights=weights)  # type: ignore[arg-type]
        out = engine([3, 7], num_inference_steps=2, noise="public", seed=8, output_type="np")
        assert np.array_equal(np.asarray(out.images), reference_images(transformer)), weights


def test_the_command_takes_a_published_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    torch.save(model(1).state_dict(), tmp_path / "model.pt")
    arguments = ["generate", "--model", str(tmp_path), "--class-label", "3", "--class-label", "7", "--steps", "2,2,2,2"]
    result = CliRunner().invoke(
        app, [*arguments, "--noise", "public", "--seed", "8", "--output", str(tmp_path / "a.npz")]
    )
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "a.npz") as archive:
        images = archive["arr_0"]
    assert np.array_equal(images, np.rint(reference_images(model(1)) * 255).astype(np.uint8))
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "a.png")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (2 * 66 + 2, 66 + 2)

"""The examples run as a reader would run them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixelflow_engine import PixelFlowEngine

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_sampler(tmp_path: Path) -> None:
    path = tmp_path / "heun.png"
    subprocess.run([sys.executable, EXAMPLES / "own_sampler.py", path], check=True)
    with Image.open(path) as image:
        assert image.size == (10 * 66 + 2, 66 + 2)
        low, high = image.convert("L").getextrema()
    assert low < 10  # type: ignore[operator]
    assert high > 245  # type: ignore[operator]


def test_own_sampler_makes_the_engines_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from own_sampler import STEPS, sample  # type: ignore[import-not-found]

    engine, labels = PixelFlowEngine.from_pretrained("digits"), [3, 7]
    options = {"seed": labels, "solver": "heun", "num_inference_steps": STEPS, "guidance_scale": 1.0}
    want = engine(labels, **options, output_type="pt").images
    got = ((sample(engine, labels, engine.config.resolution) + 1) / 2).clamp(0, 1)
    # 24 steps of 2 evaluations round sums of 1 in another order: 48 * 2^-23, ten times over for what a step magnifies.
    # With model times that are off by a thousandth the images differ by 0.014.
    assert (got - want).abs().max() < 48 * 2.0**-23 * 10


@pytest.mark.parametrize("name", ["own_sampler.py", "inpainting.py", "image_to_image.py"])
def test_without_a_name_for_the_picture_they_say_how_they_are_run(name: str) -> None:
    ran = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"python examples/{name} " in ran.stderr
    assert "Traceback" not in ran.stderr


def test_image_to_image(tmp_path: Path) -> None:
    """Each row keeps less of the given images than the one above; those of another seed are the control."""
    path = tmp_path / "kept.png"
    command = [sys.executable, EXAMPLES / "image_to_image.py", path]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    differences = [float(line.split()[-1]) for line in ran.stdout.splitlines()]
    assert len(differences) == 6
    assert differences == sorted(differences)
    assert 0 < differences[0] < differences[-1] / 8
    with Image.open(path) as image:
        assert image.size == (10 * 66 + 2, 7 * 66 + 2)
        rows = [np.asarray(image.convert("L"))[2 + 66 * i : 66 * (i + 1)].astype(int) for i in range(7)]
    for row, said in zip(rows[1:], differences, strict=True):
        inside = np.abs(row - rows[0]).sum() / (10 * 64 * 64) / 255  # the space between images is equal
        assert abs(inside - said) < 2 / 255


def test_inpainting(tmp_path: Path) -> None:
    """Whole digits, their upper halves, two completions: the known half stays, the other is made anew each time."""
    path = tmp_path / "completed.png"
    subprocess.run([sys.executable, EXAMPLES / "inpainting.py", path], check=True)
    with Image.open(path) as image:
        assert image.size == (10 * 66 + 2, 4 * 66 + 2)
        rows = [np.asarray(image.convert("L"))[2 + 66 * i : 66 * (i + 1)].astype(int) for i in range(4)]
    for row in rows[1:]:
        assert np.array_equal(row[:32], rows[0][:32])
    for one, other in ((rows[0], rows[2]), (rows[0], rows[3]), (rows[2], rows[3])):
        assert np.abs(one[32:] - other[32:]).mean() > 5
    assert rows[2][32:].max() > 200


def test_a_pipeline_of_diffusers_makes_the_engines_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are drawn from generators: one for the batch, which goes on with every call, or one for each image."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(EXAMPLES)
    from diffusers_pipeline import PixelFlowPipeline, seeds  # type: ignore[import-not-found]

    engine = PixelFlowEngine.from_pretrained("digits")
    pipeline = PixelFlowPipeline(engine).to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    generator = torch.Generator().manual_seed(7)
    first, second = (pipeline([3, 7], generator=generator, **options).images for _ in range(2))
    again = torch.Generator().manual_seed(7)
    want = [engine([3, 7], seed=seeds(again, 2), **options).images for _ in range(2)]
    assert torch.equal(first, want[0])
    assert torch.equal(second, want[1])
    assert not torch.equal(first, second)
    alone = [torch.Generator().manual_seed(i) for i in (1, 2)]
    (images,) = pipeline([3, 7], generator=alone, return_dict=False, **options)
    drawn = [seeds(torch.Generator().manual_seed(i), 1)[0] for i in (1, 2)]
    assert torch.equal(images, engine([3, 7], seed=drawn, **options).images)
    with pytest.raises(ValueError, match="generator: got 2 generators, expected one or one for each of 3 images"):
        pipeline([1, 2, 3], generator=alone, **options)

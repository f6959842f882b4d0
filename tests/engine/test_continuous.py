"""Images that come and go between steps, each at its own stage and time, end where a call of the engine ends."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.continuous import Underway, euler_step
from pixelflow_engine.guidance import stagewise_weights
from pixelflow_engine.noise import CounterNoise
from pixelflow_engine.schedule import make_stages, step_times
from pixelflow_engine.solvers import step_length
from support.engines import tiny_engine
from support.recording import packed_engine

STAGES = 3


def journey(
    engine: PixelFlowEngine, label: int, seed: int, scale: float, height: int, steps: int
) -> Iterator[Underway | Tensor]:
    """Yields what to step from; is sent the state after it; yields the finished latents at last."""
    noise = CounterNoise((seed,), engine.device)
    x = noise.initial((1, 3, height // 4, 4))[0]
    config = engine.config.scheduler
    for stage, weight in zip(make_stages(config), stagewise_weights(scale, STAGES), strict=True):
        if stage.index > 0:
            x = noise.enter(x[None], stage)[0]
        tau, t_model = step_times(stage, config, steps, 1.0)
        for i, (now, after) in enumerate(pairwise(tau.tolist())):
            length = step_length(now, after)
            x = yield Underway(latents=x, t_model=float(t_model[i]), step=length, weight=weight, class_label=label)
    yield x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_come_and_go_end_where_a_call_ends(dtype: torch.dtype) -> None:
    engine = packed_engine()
    if dtype == torch.float64:
        engine.model.double()
    asked = [(1, 5, 2.4, 16, 3), (2, 6, 1.0, 16, 2), (0, 7, 3.0, 24, 4), (4, 8, 2.0, 16, 1), (3, 9, 1.0, 8, 3)]
    waiting = [(i, journey(engine, *one)) for i, one in enumerate(asked)]
    aboard: list[tuple[int, Iterator[Underway | Tensor], Underway]] = []
    done: dict[int, Tensor] = {}
    together = set()
    while waiting or aboard:
        if waiting:  # one more comes aboard before every step
            number, trip = waiting.pop(0)
            aboard.append((number, trip, next(trip)))  # type: ignore[arg-type]
        together.add(tuple({image.latents.shape for _, _, image in aboard}))
        moved = euler_step(engine.model, [image for _, _, image in aboard])
        still = []
        for (number, trip, _), x in zip(aboard, moved, strict=True):
            assert x.dtype == dtype
            following = trip.send(x)  # type: ignore[attr-defined]
            if isinstance(following, Tensor):
                done[number] = following
            else:
                still.append((number, trip, following))
        aboard = still
    assert max(len(shapes) for shapes in together) >= 3, "images of several stages in one pack"
    for i, (label, seed, scale, height, steps) in enumerate(asked):
        options = {"seed": seed, "guidance_scale": scale, "height": height, "num_inference_steps": steps}
        (expected,) = engine([label], output_type="pt", **options).images  # type: ignore[arg-type]
        found = (done[i] / 2 + 0.5).clamp(0, 1).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-7)


def test_the_order_of_images_does_not_matter() -> None:
    engine = packed_engine()
    generator = torch.Generator().manual_seed(3)
    images = [
        Underway(
            latents=torch.randn(3, size, 8, generator=generator),
            t_model=100.0 * i,
            step=0.1 * i,
            weight=float(i % 3),
            class_label=i,
        )
        for i, size in enumerate((8, 4, 8, 16))
    ]
    forward = euler_step(engine.model, images)
    backward = euler_step(engine.model, images[::-1])
    for image, a, b in zip(images, forward, backward[::-1], strict=True):
        assert a.shape == image.latents.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert torch.equal(forward[0], images[0].latents), "a step of no length"
    assert not torch.equal(forward[1], images[1].latents)


def test_weights_that_are_not_side_by_side_are_refused() -> None:
    image = Underway(latents=torch.zeros(3, 4, 4), t_model=0.0, step=0.1, class_label=0)
    with pytest.raises(ValueError, match="side by side"):
        euler_step(tiny_engine().model, [image])


def test_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^images: got none, expected at least one$"):
        euler_step(packed_engine().model, [])


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (5, (1, None), r"^images\[1\]\.class_label: got None, expected an integer from 0 to 5"),
        (5, (6, 1), r"^images\[0\]\.class_label: got 6, expected an integer from 0 to 5"),
        (0, (None, 1), r"^images\[1\]\.class_label: got 1, expected None for a model without classes"),
    ],
)
def test_labels_that_are_not_the_models_are_refused(classes: int, labels: tuple[int | None, ...], message: str) -> None:
    images = [Underway(latents=torch.zeros(3, 4, 4), t_model=0.0, step=0.1, class_label=label) for label in labels]
    with pytest.raises(ValueError, match=message):
        euler_step(packed_engine(num_classes=classes).model, images)


def test_a_text_model_is_refused() -> None:
    image = Underway(latents=torch.zeros(3, 4, 4), t_model=0.0, step=1.0)
    with pytest.raises(ValueError, match=r"^model: got a text model, expected"):
        euler_step(packed_engine(num_classes=0, cross_attention_dim=12).model, [image])


def test_a_model_without_classes_takes_no_labels() -> None:
    image = Underway(latents=torch.zeros(3, 4, 4), t_model=0.0, step=1.0)
    (moved,) = euler_step(packed_engine(num_classes=0).model, [image])
    assert moved.any()

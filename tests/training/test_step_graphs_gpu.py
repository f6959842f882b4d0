"""Training steps on a device: the kernels' update beside AdamW in float64, and CUDA graphs of whole steps."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixelflow_engine.errors import CaptureError
from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import parts_of_step
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep
from pixelflow_training.update import FusedUpdate
from support.recipes import tiny_recipe
from support.recording import poison
from support.steps import Watched, batch_of, bits, random_state

pytestmark = pytest.mark.gpu

UNEVEN = (
    "compute.device=cuda", "scheduler.num_stages=3", "batch_size=4", "model.num_attention_heads=2",
    "model.attention_head_dim=64", "resolution=32", "optimizer.weight_decay=0.3",
)  # fmt: skip
KINDS = {
    "float32": (),
    "bfloat16": ("compute.dtype=bfloat16",),
    "parts": ("compute.dtype=bfloat16", "compute.max_tokens=70"),
    "blocks": ("compute.dtype=bfloat16", "compute.recompute=blocks"),
    "pointwise": ("compute.dtype=bfloat16", "compute.recompute=pointwise"),
    "compiled": ("compute.dtype=bfloat16", "compute.compile=true"),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, *UNEVEN, *overrides)


def state_of(config: TrainConfig) -> TrainState:
    state = random_state(config)
    return TrainState(config, state.model.cuda())


def go(step: TrainStep, config: TrainConfig, *numbers: int) -> None:
    for i in numbers:
        batch = batch_of(config, i).to(torch.device("cuda"))
        assert step(batch, 1e-3 / (1 + i), parts_of_step(config, i)).finite


def trained(config: TrainConfig, *numbers: int) -> TrainState:
    state = state_of(config)
    go(TrainStep(state, config), config, *numbers)
    return state


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "parts"])
def test_steps_are_adamws(recipe: Callable[..., TrainConfig], kind: str) -> None:
    config = recipe(*KINDS[kind])
    state = state_of(config)
    step, watched = TrainStep(state, config), Watched(state, config)
    assert isinstance(step.update, FusedUpdate)
    for i, lr in enumerate((1e-3, 2e-3)):
        watched.step(step, batch_of(config, i).to(torch.device("cuda")), lr, parts_of_step(config, i))
    watched.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_has_the_bits_of_the_launches(recipe: Callable[..., TrainConfig], kind: str) -> None:
    config = recipe(*KINDS[kind])
    assert bits(trained(recipe(*KINDS[kind], "compute.graphs=true"), *range(6))) == bits(trained(config, *range(6)))


def test_static_inputs_are_all_loaded(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("compute.graphs=true")
    state = state_of(config)
    step = TrainStep(state, config)
    go(step, config, *range(3))
    assert step.graphs is not None
    for static in step.graphs.static.values():
        for part in static.parts:
            for name in ("tokens", "targets", "t_model", "labels", "latent_size"):
                poison(getattr(part, name))
    go(step, config, *range(3, 6))
    assert bits(state) == bits(trained(recipe(), *range(6)))


def test_five_hundred_replays_keep_nothing(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("compute.graphs=true")
    step = TrainStep(state_of(config), config)
    go(step, config, *range(6))
    gc.collect()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    batch = batch_of(config, 0).to(torch.device("cuda"))
    for _ in range(500):
        step(batch, 1e-4)
    del batch
    gc.collect()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_a_replay_that_is_not_finite_changes_nothing(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("compute.graphs=true", "compute.dtype=bfloat16")
    state = state_of(config)
    step = TrainStep(state, config)
    go(step, config, 0)
    before, batch = bits(state), batch_of(config, 3).to(torch.device("cuda"))
    batch.tokens[1, 2] = math.nan
    assert not step(batch, 1e-3).finite
    assert bits(state) == before
    go(step, config, 3)
    assert bits(state) == bits(trained(recipe("compute.dtype=bfloat16"), 0, 3))


def test_a_capture_that_fails_leaves_a_step(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reads a value on the host while it is captured."""
    config = recipe("compute.graphs=true")
    state = state_of(config)
    step = TrainStep(state, config)
    before, honest = bits(state), step.update.launch
    monkeypatch.setattr(step.update, "launch", lambda losses, *more, **options: (losses.sum().item(), honest(losses, *more, **options))[1])  # noqa: E501  # fmt: skip
    with pytest.raises(CaptureError, match="graphs: a step could not be captured"):
        go(step, config, 0)
    monkeypatch.setattr(step.update, "launch", honest)
    assert bits(state) == before
    go(step, config, 0, 1)
    assert bits(state) == bits(trained(recipe(), 0, 1))


def test_another_stream_of_the_callers(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("compute.graphs=true")
    state, stream = state_of(config), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        go(TrainStep(state, config), config, *range(4))
    stream.synchronize()
    assert bits(state) == bits(trained(recipe(), *range(4)))

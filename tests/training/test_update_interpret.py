"""Training steps on the kernels under Triton's interpreter: what moves the weights, and that it can be replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pixelflow_training.config import TrainConfig
from pixelflow_training.step import TrainStep
from pixelflow_training.update import FusedUpdate
from support.recipes import tiny_recipe
from support.recording import RecordingCapture
from support.steps import Watched, batch_of, bits, random_state, recorded_step

pytestmark = [
    pytest.mark.interpret,
    # numpy's, about infinities and NaN put in on purpose
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    # Widths of 8 or less: the interpreter takes its time by values.
    small = ("model.num_attention_heads=1", "resolution=8", "batch_size=2", "optimizer.weight_decay=0.3")
    return lambda *overrides: tiny_recipe(tmp_path, "compute.backend=triton", *small, *overrides)


class Calls(TorchDispatchMode):
    """Names of our operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pixelflow":
            self.names.append(func.name().removeprefix("pixelflow::"))
        return func(*args, **(kwargs or {}))


def test_the_backend_brings_its_update_and_the_step_is_adamws(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    state = random_state(config)
    step, watched = TrainStep(state, config), Watched(state, config)
    assert isinstance(step.update, FusedUpdate)
    with Calls() as calls:
        watched.step(step, batch_of(config), 1e-3)
    watched.check()
    assert [calls.names.count(name) for name in ("gradient_norm", "adamw_ema")] == [1, 1]
    assert calls.names.count("varlen_attention_backward") == 1, "the model computed by kernels, too"


def put_infinity(parameter: Any) -> None:
    parameter.grad.view(-1)[3] = math.inf


@pytest.mark.parametrize("spoil", ["targets", "gradient"])
def test_what_is_not_finite_changes_nothing(recipe: Callable[..., TrainConfig], spoil: str) -> None:
    config = recipe()
    state = random_state(config)
    step, batch = TrainStep(state, config), batch_of(config)
    before = bits(state)
    if spoil == "targets":
        batch.targets[0, 1] = 2e19  # whose square is infinite, while its gradient is not
    else:
        step.model.proj_out_2.weight.register_post_accumulate_grad_hook(put_infinity)
    assert not step(batch, 1e-3).finite
    assert bits(state) == before


def test_a_replay_has_the_bits_of_the_launches(recipe: Callable[..., TrainConfig]) -> None:
    config, capture = recipe(), RecordingCapture()
    eager, replayed = random_state(config), random_state(config)
    steps = TrainStep(eager, config), recorded_step(replayed, config, capture)
    for step in steps:
        assert step(batch_of(config), 1e-3).finite
    assert bits(replayed) == bits(eager)
    assert (capture.captured, capture.replayed) == (1, 1)
    assert torch.isfinite(steps[1].graphs.static.popitem()[1].losses).all()  # type: ignore[union-attr]

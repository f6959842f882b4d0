"""Steps of training on a small model with random weights, whose gradients are not zero."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pixelflow_engine.graphs import Capture
from pixelflow_training import loop
from pixelflow_training import step as step_module
from pixelflow_training.collate import Batch
from pixelflow_training.config import DataConfig, TrainConfig
from pixelflow_training.data import ImageSet, load_digits
from pixelflow_training.ranks import ALONE, Ranks
from pixelflow_training.state import TrainState
from pixelflow_training.step import Stepped, TrainStep
from pixelflow_training.update import FusedUpdate, TorchUpdate
from support.adamw import Truth, assert_near
from support.recording import RecordingCapture
from support.reference_models import randomize, seeded


def random_state(config: TrainConfig, ranks: Ranks = ALONE) -> TrainState:
    """Of random weights: of a fresh model, whose output is zero, most gradients are."""
    model = loop.build_model(config)
    randomize(model, seeded(2))
    return TrainState(config, model.to(ranks.device), ranks)


def batch_of(config: TrainConfig, step: int = 0, rank: int = 0, world_size: int = 1) -> Batch:
    return loop.training_batch(
        config, digits(config.data, config.resolution, config.model.in_channels), step, rank, world_size
    )


@cache
def digits(data: DataConfig, resolution: int, channels: int) -> ImageSet:
    """Those to train on."""
    return load_digits(data, resolution, channels)[0]


def flat(tensors: Iterable[Any]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def bits(state: TrainState) -> list[bytes]:
    """Of weights, moments, averages, counts and losses."""
    return [x.cpu().numpy().tobytes() for group in state.tensors().values() for x in group.values()]


def step_of(
    state: TrainState, config: TrainConfig, fused: bool, ranks: Ranks = ALONE, capture: Capture | None = None
) -> TrainStep:
    """With PyTorch's update, or the fused one, by its operations' plain implementation where no kernel can run."""
    if fused:
        with mock.patch.object(step_module, "update_of", FusedUpdate):
            step = TrainStep(state, config, ranks, capture)
    else:
        step = TrainStep(state, config, ranks, capture)
    assert isinstance(step.update, FusedUpdate if fused else TorchUpdate)
    return step


def recorded_step(state: TrainState, config: TrainConfig, capture: RecordingCapture) -> TrainStep:
    """Whose steps are replayed from recordings."""
    step = step_of(state, replace(config, compute=replace(config.compute, graphs=True)), True, capture=capture)
    assert isinstance(step.update, FusedUpdate)
    capture.kept = step.update.changed()
    return step


class Watched:
    """A run whose every step is also done by AdamW in float64, from the same gradients.

    Args:
        state: at its beginning.
        config: the recipe.
    """

    def __init__(self, state: TrainState, config: TrainConfig) -> None:
        self.state, self.config = state, config
        self.truth = Truth(pieces(state.model.parameters()), plain=True)

    def step(self, step: TrainStep, batch: Batch, lr: float, parts: int = 1) -> Stepped:
        """A step that counts, on both sides."""
        honest, settings = step.update.launch, self.config.optimizer
        given: list[Tensor] = []
        own_norm = isinstance(step.update, TorchUpdate)

        def launch(losses: Tensor, model: Any, zero: bool = False) -> Tensor:
            # PyTorch's norm is summed in float32, whose error grows with the model: AdamW is held to what it is given.
            norm = honest(losses, model, zero) if own_norm else None
            given[:] = [x.clone() for x in pieces(p.grad for p in model.parameters())]
            return honest(losses, model, zero) if norm is None else norm

        step.update.launch = launch  # type: ignore[method-assign]
        try:
            done = step(batch, lr, parts)
        finally:
            step.update.launch = honest  # type: ignore[method-assign]
        assert done.finite
        self.truth.step(
            given,
            lr,
            (settings.betas[0], settings.betas[1]),
            1e-8,
            settings.weight_decay,
            math.inf if own_norm else settings.max_grad_norm,
            self.config.ema_decay,
        )
        return done

    def check(self) -> None:
        """Weights and averages are as near to float64 as float32 can be; moments and counts are of as many steps."""
        truth, state = self.truth, self.state
        assert_near(pieces(state.model.parameters()), truth.p, truth.ep, "weights")
        assert_near(pieces(state.ema.model.parameters()), truth.a, truth.ea, "averages")
        moments = [state.optimizer.state[p] for p in state.model.parameters()]
        assert_near(pieces(m["exp_avg"] for m in moments), truth.m, truth.em, "first moments")
        assert_near(pieces(m["exp_avg_sq"] for m in moments), truth.v, truth.ev, "second moments")
        assert {int(m["step"]) for m in moments} == {state.ema.step} == {truth.t}


def pieces(tensors: Iterable[Any]) -> list[Tensor]:
    """Whole tensors, whoever has their parts."""
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for x in tensors]

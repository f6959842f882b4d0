"""Training steps on a small model with random weights, so that gradients are not zero."""

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
    """Return a state with random weights: the output of a fresh model is zero, and so are most of its gradients."""
    model = loop.build_model(config)
    randomize(model, seeded(2))
    return TrainState(config, model.to(ranks.device), ranks)


def batch_of(config: TrainConfig, step: int = 0, rank: int = 0, world_size: int = 1) -> Batch:
    return loop.training_batch(
        config, digits(config.data, config.resolution, config.model.in_channels), step, rank, world_size
    )


@cache
def digits(data: DataConfig, resolution: int, channels: int) -> ImageSet:
    """Return the training digits."""
    return load_digits(data, resolution, channels)[0]


def flat(tensors: Iterable[Any]) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def bits(state: TrainState) -> list[bytes]:
    """Return the bytes of weights, moments, averages, counts and losses."""
    return [x.cpu().numpy().tobytes() for group in state.tensors().values() for x in group.values()]


def step_of(
    state: TrainState, config: TrainConfig, fused: bool, ranks: Ranks = ALONE, capture: Capture | None = None
) -> TrainStep:
    """Return a step with PyTorch's update or the fused one, whose plain implementation runs where no kernel can."""
    if fused:
        with mock.patch.object(step_module, "update_of", FusedUpdate):
            step = TrainStep(state, config, ranks, capture)
    else:
        step = TrainStep(state, config, ranks, capture)
    assert isinstance(step.update, FusedUpdate if fused else TorchUpdate)
    return step


def recorded_step(state: TrainState, config: TrainConfig, capture: RecordingCapture) -> TrainStep:
    """Return a step that is replayed from recordings."""
    step = step_of(state, replace(config, compute=replace(config.compute, graphs=True)), True, capture=capture)
    assert isinstance(step.update, FusedUpdate)
    capture.kept = step.update.changed()
    return step


class Watched:
    """A run in which every step is repeated by AdamW in float64, from the same gradients.

    Args:
        state: initial state.
        config: the recipe.
    """

    def __init__(self, state: TrainState, config: TrainConfig) -> None:
        self.state, self.config = state, config
        self.truth = Truth(pieces(state.model.parameters()), plain=True)

    def step(self, step: TrainStep, batch: Batch, lr: float, parts: int = 1) -> Stepped:
        """Make a step, which must not be skipped, on both sides."""
        honest, settings = step.update.launch, self.config.optimizer
        given: list[Tensor] = []
        own_norm = isinstance(step.update, TorchUpdate)

        def launch(losses: Tensor, model: Any, zero: bool = False) -> Tensor:
            # PyTorch sums its norm in float32, with an error that grows with the model: float64 takes what it clipped.
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
        """Assert that weights, moments and averages are within float32's bounds of float64, and step counts equal."""
        truth, state = self.truth, self.state
        assert_near(pieces(state.model.parameters()), truth.p, truth.ep, "weights")
        assert_near(pieces(state.ema.model.parameters()), truth.a, truth.ea, "averages")
        moments = [state.optimizer.state[p] for p in state.model.parameters()]
        assert_near(pieces(m["exp_avg"] for m in moments), truth.m, truth.em, "first moments")
        assert_near(pieces(m["exp_avg_sq"] for m in moments), truth.v, truth.ev, "second moments")
        assert {int(m["step"]) for m in moments} == {state.ema.step} == {truth.t}


def pieces(tensors: Iterable[Any]) -> list[Tensor]:
    """Return whole tensors, also of sharded ones."""
    return [(x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for x in tensors]

"""One step of training: velocity, loss and gradients of a batch in parts, then clip, AdamW and EMA."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelflow_engine.backends import Backend, choose
from pixelflow_engine.compilation import compile_blocks
from pixelflow_engine.layers import at_least_fp32
from pixelflow_engine.model import PackedTransformer

from .collate import Batch
from .config import TrainConfig
from .loss import image_losses
from .parallel import exchanging, is_sharded, whole
from .ranks import ALONE, Ranks
from .recompute import recompute
from .state import TrainState


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step did.

    Attributes:
        loss: mean over the images of all ranks.
        stage_loss: mean over those of each stage; None for a stage without images.
        norm: of the gradient before it was clipped.
        tokens: of all images.
    """

    loss: float
    stage_loss: list[float | None]
    norm: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether loss and norm are; if not, nothing was changed."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainStep:
    """Trains the model of a state, batch by batch.

    Weights, moments and averages are float32. Where the recipe's ``compute.dtype`` is another, the velocities and their
    gradients are computed by a copy of the model in that type, which takes over the weights after every step; the
    gradients of several parts are added up in float32.

    Args:
        state: whose model, optimizer and average are moved.
        config: the recipe.
        ranks: who takes part.

    Raises:
        BackendUnavailableError: the recipe names a backend that cannot run there.
    """

    def __init__(self, state: TrainState, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.state, self.config, self.ranks = state, config, ranks
        self.model = computing_model(state.model, config)
        self._velocities = exchanging(self.model, ranks)

    def __call__(self, batch: Batch, lr: float, parts: int = 1) -> Stepped:
        """One step; nothing is changed if the loss or the gradient's norm is not finite, on any rank.

        Args:
            batch: this rank's share, where the model is.
            lr: the learning rate.
            parts: packs in which it is computed, one after the other; the same on all ranks.
        """
        # Ranks' gradients are averaged, and a rank's share may have an image more than another's.
        images = self.config.batch_size / self.ranks.world_size
        losses, stages = [], []
        mine = batch.parts(min(parts, batch.layout.num_images))
        for part in mine:
            found = batch_losses(self._velocities, part)
            (found.sum() / images).backward()
            self._collect()
            losses.append(found.detach())
            stages += part.stage.tolist()
        for _ in range(parts - len(mine)):  # of ranks with an image more: gradients are exchanged in every part
            (batch_losses(self._velocities, mine[-1]).sum() * 0).backward()
            self._collect()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.state.model.parameters(), self.config.optimizer.max_grad_norm))
        *each, size = torch.cat([*losses, norm[None]]).tolist()  # the host waits once
        of_stages = stage_sums(each, stages, self.config.scheduler.num_stages)
        total, tokens, *sums = self.ranks.total([math.fsum(each), batch.layout.num_tokens, *of_stages])
        stepped = Stepped(total / self.config.batch_size, stage_means(sums), size, round(tokens))
        if stepped.finite:
            self._update(lr)
        self.state.optimizer.zero_grad(set_to_none=True)
        return stepped

    @torch.no_grad()
    def _collect(self) -> None:
        """Add the computing copy's gradients to those of the weights."""
        if self.model is self.state.model:
            return
        for master, computing in zip(self.state.model.parameters(), self.model.parameters(), strict=True):
            if computing.grad is None:
                continue
            if master.grad is None:
                master.grad = computing.grad.to(master.dtype)
            else:
                master.grad += computing.grad
            computing.grad = None

    def _update(self, lr: float) -> None:
        state = self.state
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        state.ema.update(state.model)
        if self.model is not state.model:
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), list(state.model.parameters()))


def backend_of(config: TrainConfig, device: torch.device) -> Backend:
    """Who computes, by the recipe.

    Raises:
        BackendUnavailableError: it cannot run there.
    """
    compute = config.compute
    return choose(compute.backend, device, getattr(torch, compute.dtype), config.model.attention_head_dim)


def computing_model(model: PackedTransformer, config: TrainConfig) -> PackedTransformer:
    """Who computes velocities: the model itself, or a copy in the recipe's type."""
    compute, dtype = config.compute, getattr(torch, config.compute.dtype)
    backend = backend_of(config, model.device)
    if dtype != model.dtype and not is_sharded(model):  # which gathers weights in that type
        model = copy.deepcopy(model).to(dtype)
    model.operations = backend.operations(compute.compile, known_packs=True)
    recompute(model, compute.recompute)
    if compute.compile:
        compile_blocks(model)
    return model


def batch_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each image of a batch, ``[n]``, in at least float32."""
    velocities: Tensor = model(batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels)
    return image_losses(velocities.to(at_least_fp32(velocities.dtype)), batch.targets, batch.layout)


def stage_sums(losses: Sequence[float], stages: Sequence[int], num_stages: int) -> list[float]:
    """The sum of the losses of each stage, then the number of its images: ``2 S`` numbers that add up over ranks."""
    members = [[loss for loss, stage in zip(losses, stages, strict=True) if stage == s] for s in range(num_stages)]
    return [*(math.fsum(part) for part in members), *(float(len(part)) for part in members)]


def stage_means(sums: Sequence[float]) -> list[float | None]:
    """Mean loss of each stage from :func:`stage_sums`; None for a stage without images."""
    half = len(sums) // 2
    return [total / count if count else None for total, count in zip(sums[:half], sums[half:], strict=True)]

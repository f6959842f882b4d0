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
from pixelflow_engine.graphs import Capture
from pixelflow_engine.layers import at_least_fp32
from pixelflow_engine.model import PackedTransformer, Surroundings
from pixelflow_engine.ranges import named

from .collate import Batch
from .config import TrainConfig
from .graphs import StepGraphs, graphs_of, refuse_graphs
from .loss import image_losses
from .parallel import exchanging, is_sharded
from .ranks import ALONE, Ranks
from .recompute import recompute
from .state import TrainState
from .update import FusedUpdate, TorchUpdate, Update


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
        capture: makes the graphs of ``compute.graphs``; by default CUDA's.

    Raises:
        BackendUnavailableError: the recipe names a backend that cannot run there.
        ConfigError: the recipe asks for graphs where there are none.
    """

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        ranks: Ranks = ALONE,
        capture: Capture | None = None,
    ) -> None:
        self.state, self.config, self.ranks = state, config, ranks
        self.model = computing_model(state.model, config)
        self._velocities = exchanging(self.model, config, ranks)
        self.update = update_of(state, self.model, config, ranks)
        self.graphs: StepGraphs | None = None
        if config.compute.graphs:
            capture = graphs_of(config, ranks, state.model.device, self.update) if capture is None else capture
            self.graphs = StepGraphs(self.model, self.launch, self.update, capture, config)

    def __call__(self, batch: Batch, lr: float, parts: int = 1) -> Stepped:
        """One step; nothing is changed if the loss or the gradient's norm is not finite, on any rank.

        Args:
            batch: this rank's share, where the model is.
            lr: the learning rate.
            parts: packs in which it is computed, one after the other; the same on all ranks.

        Raises:
            CaptureError: the step could not be captured into a graph. Nothing has changed; it may be called again.
            ValueError: with graphs: the batch has a shape that no step of the recipe has.
        """
        mine = batch.parts(min(parts, batch.layout.num_images))
        if self.graphs is not None:
            losses, norm = self.graphs(mine, lr)
        else:
            self.update.prepare(lr)
            losses, norm = self.launch(mine, [batch.smallest()] * (parts - len(mine)))
        *each, size = torch.cat([losses, norm[None]]).tolist()  # the host waits once
        of_stages = stage_sums(
            each, [s for part in mine for s in part.stage.tolist()], self.config.scheduler.num_stages
        )
        total, tokens, *sums = self.ranks.total([math.fsum(each), batch.layout.num_tokens, *of_stages])
        stepped = Stepped(total / self.config.batch_size, stage_means(sums), size, round(tokens))
        self.update.finish(stepped.finite)
        if self.graphs is None:
            for model in (self.state.model, self.model):
                model.zero_grad(set_to_none=True)
        return stepped

    def for_recipe(self, config: TrainConfig) -> TrainStep:
        """The same step, with all that was compiled and copied for it, for batches of another size.

        Args:
            config: a recipe that differs in ``batch_size`` alone. A step with graphs is made anew instead.
        """
        assert self.graphs is None, "graphs are of the shapes of one recipe"
        other = copy.copy(self)
        other.config = config
        return other

    def launch(
        self, parts: Sequence[Batch], idle: Sequence[Batch] = (), around: Sequence[Surroundings | None] = ()
    ) -> tuple[Tensor, Tensor]:
        """All that a device does in a step, after which the host decides what is left to it.

        Args:
            parts: of this rank's share.
            idle: packs to compute while other ranks have parts left, as gradients are exchanged in each.
            around: what the blocks share in each part, where it was made before.

        Returns:
            losses of the images, part after part, ``[n]``; the gradient's norm before clipping, 0-d.
        """
        # Of one part the fused update takes gradients as they are: there is no sum that float32 would make better.
        rounded = self.update.takes_rounded and self.config.compute.max_tokens is None and len(parts) == 1
        source = self.model if rounded else self.state.model
        losses = self.backward(parts, idle, around, source)
        return losses, self.update.launch(losses, source, zero=self.graphs is not None)

    def backward(
        self,
        parts: Sequence[Batch],
        idle: Sequence[Batch] = (),
        around: Sequence[Surroundings | None] = (),
        into: nn.Module | None = None,
    ) -> Tensor:
        """Add the gradients of the mean loss of a step to ``grad``, in the model given, or else the state's.

        Args:
            parts, idle, around: as in :meth:`launch`.
            into: the state's model, or the computing one for a single part.

        Returns:
            losses of the images, part after part, ``[n]``.
        """
        # Ranks' gradients are averaged, and a rank's share may have an image more than another's.
        images = self.config.batch_size / self.ranks.world_size
        losses = []
        for i, part in enumerate([*parts, *idle]):
            with named("forward"):
                found = batch_losses(self._velocities, part, around[i] if around else None)
                weighted = found.sum() / images if i < len(parts) else found.sum() * 0
            with named("backward"):
                weighted.backward()
                if into is not self.model:
                    self._collect()
            losses.append(found.detach())
        return torch.cat(losses[: len(parts)])

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


def check_step(config: TrainConfig, ranks: Ranks) -> None:
    """Whether steps can be computed there as the recipe says.

    Raises:
        BackendUnavailableError: its backend cannot run.
        ConfigError: there are no graphs.
    """
    backend = backend_of(config, ranks.device)
    if config.compute.graphs:
        refuse_graphs(backend.name, ranks, ranks.device)


def update_of(state: TrainState, computing: PackedTransformer, config: TrainConfig, ranks: Ranks) -> Update:
    """What moves the weights: the kernels where they compute, PyTorch's AdamW elsewhere."""
    if backend_of(config, state.model.device).name == "torch":
        return TorchUpdate(state, computing, config)
    return FusedUpdate(state, computing, config, ranks)


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
    if compute.compile:
        compile_blocks(model)
    recompute(model, compute.recompute)  # around what is compiled, which would take its place otherwise
    return model


def batch_losses(model: nn.Module, batch: Batch, around: Surroundings | None = None) -> Tensor:
    """Loss of each image of a batch, ``[n]``, in at least float32; ``around`` as the model takes it."""
    given = {} if around is None else {"around": around}
    velocities: Tensor = model(batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels, **given)
    return image_losses(velocities.to(at_least_fp32(velocities.dtype)), batch.targets, batch.layout)


def stage_sums(losses: Sequence[float], stages: Sequence[int], num_stages: int) -> list[float]:
    """The sum of the losses of each stage, then the number of its images: ``2 S`` numbers that add up over ranks."""
    members = [[loss for loss, stage in zip(losses, stages, strict=True) if stage == s] for s in range(num_stages)]
    return [*(math.fsum(part) for part in members), *(float(len(part)) for part in members)]


def stage_means(sums: Sequence[float]) -> list[float | None]:
    """Mean loss of each stage from :func:`stage_sums`; None for a stage without images."""
    half = len(sums) // 2
    return [total / count if count else None for total, count in zip(sums[:half], sums[half:], strict=True)]

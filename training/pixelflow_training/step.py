"""A training step: velocities, losses and gradients of a batch, possibly in parts, then clipping, AdamW and EMA."""

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
from pixelflow_kernels.transfers import Download

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
    """The results of a step.

    Attributes:
        loss: mean over the images of all ranks.
        stage_loss: mean over the images of each stage; None for a stage without images.
        norm: gradient norm before clipping.
        tokens: number of tokens of all images of all ranks.
    """

    loss: float
    stage_loss: list[float | None]
    norm: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite; if not, the step has changed nothing."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True, slots=True)
class Begun:
    """A step that was launched and not yet waited for.

    Attributes:
        numbers: the losses of this rank's images, then the gradient norm, on their way to the host.
        stages: the stage of each image, in the order of the losses.
        tokens: number of tokens of this rank's images.
    """

    numbers: Download
    stages: list[int]
    tokens: int


class TrainStep:
    """Trains the model of a state, batch by batch.

    Weights, moments and averages are float32. If the recipe's ``compute.dtype`` is another type, a copy of the model in
    that type computes velocities and their gradients and takes over the weights after every step; sharded weights are
    gathered in that type instead. The gradients of several parts are accumulated in float32.

    Args:
        state: the state whose model, optimizer and average are updated.
        config: the recipe.
        ranks: the ranks that train together.
        capture: makes the graphs of ``compute.graphs``; by default CUDA's.

    Raises:
        BackendUnavailableError: the recipe's backend cannot run on the device.
        ConfigError: the recipe asks for graphs where steps cannot be captured.
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
        """Run one step: :meth:`begin` and :meth:`finish`."""
        return self.finish(self.begin(batch, lr, parts))

    def begin(self, batch: Batch, lr: float, parts: int = 1) -> Begun:
        """Launch a step without waiting for it; nothing is changed if loss or gradient norm is not finite on any rank.

        Args:
            batch: this rank's share, on the model's device.
            lr: the learning rate.
            parts: number of packs in which to compute it, one after the other; the same on all ranks.

        Raises:
            CaptureError: the step could not be captured into a graph. Nothing has changed, and the step may be retried.
            ValueError: with graphs: no step of the recipe has a batch of this shape.
        """
        mine = batch.parts(min(parts, batch.layout.num_images))
        if self.graphs is not None:
            losses, norm = self.graphs(mine, lr)
        else:
            self.update.prepare(lr)
            losses, norm = self.launch(mine, [batch.smallest()] * (parts - len(mine)))
        stages = [s for part in mine for s in part.stage.tolist()]
        return Begun(Download(torch.cat([losses, norm[None]])), stages, batch.layout.num_tokens)

    def finish(self, begun: Begun) -> Stepped:
        """Wait for a step's numbers, the only ones that the host reads, and complete it; steps end in their order."""
        *each, size = begun.numbers.wait().tolist()
        of_stages = stage_sums(each, begun.stages, self.config.scheduler.num_stages)
        total, tokens, *sums = self.ranks.total([math.fsum(each), begun.tokens, *of_stages])
        stepped = Stepped(total / self.config.batch_size, stage_means(sums), size, round(tokens))
        self.update.finish(stepped.finite)
        if self.graphs is None:
            for model in (self.state.model, self.model):
                model.zero_grad(set_to_none=True)
        return stepped

    def for_recipe(self, config: TrainConfig) -> TrainStep:
        """Return the same step, sharing everything that was compiled and copied for it, for batches of another size.

        Args:
            config: a recipe that differs in ``batch_size`` alone. A step with graphs must be constructed anew instead.
        """
        assert self.graphs is None, "graphs are of the shapes of one recipe"
        other = copy.copy(self)
        other.config = config
        return other

    def launch(
        self, parts: Sequence[Batch], idle: Sequence[Batch] = (), around: Sequence[Surroundings | None] = ()
    ) -> tuple[Tensor, Tensor]:
        """Launch all device work of a step that does not depend on a decision of the host.

        Args:
            parts: the packs of this rank's share.
            idle: packs to compute while other ranks have parts left, because gradients are exchanged in each part; they
                have a weight of zero.
            around: precomputed :class:`Surroundings` for each part; computed by the model if empty.

        Returns:
            losses of the images, part after part, ``[n]``; the gradient norm before clipping, 0-d.
        """
        # For a single part, the fused update takes gradients in the type they were computed in: nothing is accumulated,
        # so float32 would add no accuracy.
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
        """Accumulate the gradients of the step's mean loss in ``grad`` of ``into``, or of the state's model if None.

        Args:
            parts, idle, around: see :meth:`launch`.
            into: the state's model, or the computing model if there is a single part.

        Returns:
            losses of the images, part after part, ``[n]``.
        """
        # Gradients are averaged over ranks whose shares may differ by one image, so divide by the mean share.
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
        """Move the gradients of the computing copy, if there is one, to the weights, adding in the weights' type."""
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
    """Check that steps can be computed as the recipe says.

    Raises:
        BackendUnavailableError: its backend cannot run on the device.
        ConfigError: it asks for graphs where steps cannot be captured.
    """
    backend = backend_of(config, ranks.device)
    if config.compute.graphs:
        refuse_graphs(backend.name, ranks, ranks.device)


def update_of(state: TrainState, computing: PackedTransformer, config: TrainConfig, ranks: Ranks) -> Update:
    """Return the update of the weights: the fused kernels' unless the backend is ``torch``, else PyTorch's AdamW."""
    if backend_of(config, state.model.device).name == "torch":
        return TorchUpdate(state, computing, config)
    return FusedUpdate(state, computing, config, ranks)


def backend_of(config: TrainConfig, device: torch.device) -> Backend:
    """Return the backend that the recipe selects on a device.

    Raises:
        BackendUnavailableError: it cannot run there.
    """
    compute = config.compute
    return choose(compute.backend, device, getattr(torch, compute.dtype), config.model.attention_head_dim)


def computing_model(model: PackedTransformer, config: TrainConfig) -> PackedTransformer:
    """Return the model that computes velocities, set up as ``compute`` says: the given one, or a copy in its type."""
    compute, dtype = config.compute, getattr(torch, config.compute.dtype)
    backend = backend_of(config, model.device)
    if dtype != model.dtype and not is_sharded(model):  # sharded weights are gathered in that type
        model = copy.deepcopy(model).to(dtype)
    model.operations = backend.operations(compute.compile, known_packs=True)
    if compute.compile:
        compile_blocks(model)
    recompute(model, compute.recompute)  # after compiling, which would otherwise replace the wrapped forward
    return model


def batch_losses(model: nn.Module, batch: Batch, around: Surroundings | None = None) -> Tensor:
    """Return the loss of each image of a batch, ``[n]``, in at least float32; ``around`` as the model takes it."""
    given = {} if around is None else {"around": around}
    velocities: Tensor = model(batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels, **given)
    return image_losses(velocities.to(at_least_fp32(velocities.dtype)), batch.targets, batch.layout)


def stage_sums(losses: Sequence[float], stages: Sequence[int], num_stages: int) -> list[float]:
    """Return the sum of losses of each stage, then the number of its images: ``2 S`` numbers, additive over ranks."""
    members = [[loss for loss, stage in zip(losses, stages, strict=True) if stage == s] for s in range(num_stages)]
    return [*(math.fsum(part) for part in members), *(float(len(part)) for part in members)]


def stage_means(sums: Sequence[float]) -> list[float | None]:
    """Return the mean loss of each stage from :func:`stage_sums`; None for a stage without images."""
    half = len(sums) // 2
    return [total / count if count else None for total, count in zip(sums[:half], sums[half:], strict=True)]

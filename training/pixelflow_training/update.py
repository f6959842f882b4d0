"""The optimizer update: gradient norm, clipping, AdamW, moving average, and refresh of the computing copy.

Both implementations change the same tensors of a :class:`TrainState` and keep the same counts, so a run may switch
between them. :class:`TorchUpdate` uses PyTorch's operations and has the bits of a plain loop; the host decides whether
the step counts. :class:`FusedUpdate` uses the kernels; the device decides, so that the host need not be waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixelflow_engine.ranges import named
from pixelflow_kernels.adamw import FusedAdamW

from .config import TrainConfig
from .parallel import mine, whole
from .ranks import ALONE, Ranks
from .state import TrainState

LARGEST_CLIP = 2.0**62
"""Upper limit of the clipping norm given to the kernels: squares of clipped gradients must be finite in float32."""


class Update(Protocol):
    """Updates the weights of a state from complete gradients.

    Attributes:
        takes_rounded: whether gradients may be those of the computing copy, in its type.
    """

    takes_rounded: bool

    def prepare(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        ...

    def launch(self, losses: Tensor, model: nn.Module, zero: bool = False) -> Tensor:
        """Clip the gradients, and update the weights if the device decides whether the step counts.

        The host does not wait for the device.

        Args:
            losses: ``[n]`` float32, of this rank's images: if one is not finite, the step must change nothing.
            model: the model whose ``grad`` are used.
            zero: whether to zero the gradients in place afterwards, keeping their memory.

        Returns:
            the norm before clipping, over all ranks, 0-d float32.
        """
        ...

    def finish(self, finite: bool) -> None:
        """Complete the step once the host knows whether losses and norm are finite on all ranks.

        If they are, update the weights unless the device has done so, and count the step.
        """
        ...

    def follow(self) -> None:
        """Copy the weights into the computing copy, after they were changed from outside."""
        ...


class TorchUpdate:
    """The update in PyTorch, see :class:`Update`; the host decides whether a step counts.

    Args:
        state: the state whose weights, moments and averages are updated.
        computing: the model that computes: the state's model, or a copy of it in another type.
        config: the recipe.
    """

    takes_rounded = False

    def __init__(self, state: TrainState, computing: nn.Module, config: TrainConfig) -> None:
        self.state, self.computing, self.max_norm = state, computing, config.optimizer.max_grad_norm

    def prepare(self, lr: float) -> None:
        """See :class:`Update`."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr

    def launch(self, losses: Tensor, model: nn.Module, zero: bool = False) -> Tensor:
        """See :class:`Update`; ``zero`` is ignored, as only graphs need it, which require :class:`FusedUpdate`."""
        with named("clip"):
            return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_norm))

    def finish(self, finite: bool) -> None:
        """See :class:`Update`."""
        if not finite:
            return
        with named("optimizer"):
            self.state.optimizer.step()
        with named("ema"):
            self.state.ema.update(self.state.model)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """See :class:`Update`."""
        if self.computing is not self.state.model:
            torch._foreach_copy_(list(self.computing.parameters()), list(self.state.model.parameters()))


class FusedUpdate:
    """The update in four kernel launches for the whole model, see :class:`Update`; the device decides.

    AdamW and the average equal those of :class:`TorchUpdate` up to rounding. Sharded weights are updated in place, by a
    norm summed over the ranks that share a copy.

    Args:
        state: the state whose weights, moments and averages are updated.
        computing: the model that computes: the state's model, or a copy of it in bfloat16, which is written in the same
            pass.
        config: the recipe.
        ranks: the ranks, all of which must have finite losses for a step to count.

    Raises:
        ValueError: weights, moments or averages are not contiguous float32 tensors on one device.
    """

    takes_rounded = True

    def __init__(self, state: TrainState, computing: nn.Module, config: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.state, self.ranks = state, ranks
        parameters = list(state.model.parameters())
        kept: list[dict[str, Tensor]] = [state.optimizer.state[parameter] for parameter in parameters]
        self.counts = [moments["step"] for moments in kept]
        self.sharing = _sharing_group(parameters[0])
        settings = config.optimizer
        self.fused = FusedAdamW(
            local(parameters),
            local(list(state.ema.model.parameters())),
            local(list(computing.parameters())) if computing is not state.model else (),
            moments=(local([m["exp_avg"] for m in kept]), local([m["exp_avg_sq"] for m in kept])),
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            max_norm=min(settings.max_grad_norm, LARGEST_CLIP),
            ema_decay=config.ema_decay,
        )
        self._gate = torch.zeros((), device=self.fused.counters.device)

    def prepare(self, lr: float) -> None:
        """See :class:`Update`.

        The device's step count is set to the average's, which :class:`TorchUpdate` advances as well.
        """
        self.fused.lr.fill_(lr)
        self.fused.counters[:1].fill_(self.state.ema.step)

    @torch.no_grad()
    def launch(self, losses: Tensor, model: nn.Module, zero: bool = False) -> Tensor:
        """See :class:`Update`.

        Raises:
            ValueError: a parameter has no gradient; the message names it.
        """
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        if missing:
            raise ValueError(f"gradients: got none for {missing[0]}, expected one for every parameter")
        gradients = local([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        if self.sharing is not None:  # the first forward pass pads shards and thereby moves them, once
            self.fused.parameters = local(list(self.state.model.parameters()))
            self.fused.averages = local(list(self.state.ema.model.parameters()))
        total = losses.double().sum()  # in float64 a sum of finite float32 losses is finite
        with named("clip"):
            norm = self.fused.norm(gradients)
            if self.sharing is not None:
                square = norm.double().square()
                dist.all_reduce(square, group=self.sharing)
                norm = square.sqrt().float()
            if not self.ranks.alone:
                dist.all_reduce(total)
        with named("optimizer"):
            # With finite losses and an open gate this adds zero to the norm; otherwise NaN, which skips the update.
            self.fused.update(gradients, norm + (0 * total).float() + self._gate, zero_gradients=zero)
        return norm

    @torch.no_grad()
    def finish(self, finite: bool) -> None:
        """See :class:`Update`. The device has its own counts; the host keeps these from ``finite``."""
        if finite:
            self.state.ema.step += 1
            torch._foreach_add_(self.counts, 1.0)

    @torch.no_grad()
    def follow(self) -> None:
        """See :class:`Update`."""
        if self.fused.copies:
            torch._foreach_copy_(self.fused.copies, self.fused.parameters)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Context in which launches run but change nothing except gradients: no step counts."""
        self._gate.fill_(torch.nan)
        try:
            yield
        finally:
            self._gate.zero_()

    def changed(self) -> list[Tensor]:
        """Return the tensors that a counted step changes on the device: weights, moments, averages, copies."""
        fused = self.fused
        return [*fused.parameters, *fused.exp_avgs, *fused.exp_avg_sqs, *fused.averages, *fused.copies]


@torch.no_grad()
def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's shard of each tensor, without copies."""
    return [mine(tensor) for tensor in tensors]


def _sharing_group(parameter: Any) -> dist.ProcessGroup | None:
    """Return the group of ranks that share one copy of the weights; None where each rank has its own copy."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    return mesh.get_group("shard") if mesh.ndim > 1 else mesh.get_group()

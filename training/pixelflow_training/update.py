"""What a step does with gradients: norm, clipping, AdamW, moving average, and the copy that computes.

Both ways change the same tensors of a :class:`TrainState` and count alike, so a run may take one and go on with the
other. :class:`TorchUpdate` is PyTorch's own, for which the host decides whether the step counts; it has the bits of a
plain loop. :class:`FusedUpdate` is the kernels', for which the device decides, so that the host need not be waited for.
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
"""What the kernels clip to where a recipe clips to more: squares of what is larger are infinite in float32."""


class Update(Protocol):
    """Moves the weights of a state once all gradients are there.

    Attributes:
        takes_rounded: whether gradients may be those of the computing copy, in its type.
    """

    takes_rounded: bool

    def prepare(self, lr: float) -> None:
        """Before a step: its learning rate."""
        ...

    def launch(self, losses: Tensor, model: nn.Module, zero: bool = False) -> Tensor:
        """Clip the gradients, and move the weights if that is decided on the device. Nothing waits for it.

        Args:
            losses: ``[n]`` float32, of this rank's images: if one is not finite, the step must change nothing.
            model: whose ``grad`` they are.
            zero: gradients are zeros afterwards, and stay where they are.

        Returns:
            the norm before clipping, over all ranks, 0-d float32.
        """
        ...

    def finish(self, finite: bool) -> None:
        """Once the host knows whether losses and norm are finite on all ranks: move the weights if that is still to be
        done, and count."""
        ...

    def follow(self) -> None:
        """Have the computing copy take over the weights, which were changed from outside."""
        ...


class TorchUpdate:
    """PyTorch's, see :class:`Update`; the host decides.

    Args:
        state: whose weights, moments and averages are changed.
        computing: who computes: the state's model, or a copy of it in another type.
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
        """See :class:`Update`."""
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
    """The kernels', see :class:`Update`: the whole model in four launches, whether the step counts is decided there.

    AdamW and the average are those of :class:`TorchUpdate` up to rounding. Sharded weights are updated where they lie,
    by a norm summed over the ranks that share a copy.

    Args:
        state: whose weights, moments and averages are changed.
        computing: who computes: the state's model, or a copy of it in bfloat16, which is written in the same pass.
        config: the recipe.
        ranks: all must agree that a step counts.

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
        """See :class:`Update`. The steps taken are the average's, whoever took them."""
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
        if self.sharing is not None:  # a shard moves once, when the first forward pass pads it
            self.fused.parameters = local(list(self.state.model.parameters()))
            self.fused.averages = local(list(self.state.ema.model.parameters()))
        total = losses.double().sum()  # of finite float32 numbers it is finite
        with named("clip"):
            norm = self.fused.norm(gradients)
            if self.sharing is not None:
                square = norm.double().square()
                dist.all_reduce(square, group=self.sharing)
                norm = square.sqrt().float()
            if not self.ranks.alone:
                dist.all_reduce(total)
        with named("optimizer"):
            # Zero times what is finite is zero; times anything else, and beside a closed gate, it is NaN.
            self.fused.update(gradients, norm + (0 * total).float() + self._gate, zero_gradients=zero)
        return norm

    @torch.no_grad()
    def finish(self, finite: bool) -> None:
        """See :class:`Update`. What is counted on the device, the host has found out by itself."""
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
        """Inside, launches run and change nothing but gradients: no step counts."""
        self._gate.fill_(torch.nan)
        try:
            yield
        finally:
            self._gate.zero_()

    def changed(self) -> list[Tensor]:
        """What a step that counts changes on the device: weights, moments, averages, copies."""
        fused = self.fused
        return [*fused.parameters, *fused.exp_avgs, *fused.exp_avg_sqs, *fused.averages, *fused.copies]


@torch.no_grad()
def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each, in the memory where it lies."""
    return [mine(tensor) for tensor in tensors]


def _sharing_group(parameter: Any) -> dist.ProcessGroup | None:
    """The ranks that have one copy of the weights together; None where each has its own."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    return mesh.get_group("shard") if mesh.ndim > 1 else mesh.get_group()

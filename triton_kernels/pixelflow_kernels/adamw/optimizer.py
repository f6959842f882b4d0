"""AdamW and a moving average of a model's parameters, made once and updated in each training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import apply_update, check_numbers, check_settings, check_types, measure, named_lists
from .table import TensorTable, capturing, check_apart, check_lists


class FusedAdamW:
    """AdamW with clipping, moving average and rounded copies: four launches a step, whatever the model.

    A step neither waits for the device nor depends on what it computes, so it can be captured into a CUDA graph: with
    static gradients, after one step outside. On a CPU the same numbers come from plain PyTorch.

    Args:
        parameters: float32, contiguous, updated in place.
        averages: like them, moved towards them in place; or none. They start as what they hold.
        copies: like them in bf16 or fp16, written in place; or none. They are filled at once.
        moments: first and second moments to go on with, like the parameters, updated in place; zeros where they are not
            given.
        lr: learning rate; change it by ``optimizer.lr.fill_()``.
        betas, eps, weight_decay, max_norm, ema_decay: as in :func:`adamw_ema_`.

    Attributes:
        parameters, averages, copies: the lists given.
        exp_avgs, exp_avg_sqs: moments, float32.
        counters: ``[3]`` int64 on the device: steps taken, skipped, and skipped in a row up to now. Read them late.
        lr: 0-d float64 on the device.

    Raises:
        ValueError: a number, shape, type, device or stride is not as said, or two tensors share memory; the message
            names it.

    All that a step depends on is in these tensors; to go on from a checkpoint, fill them in place.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        averages: Sequence[Tensor] = (),
        copies: Sequence[Tensor] = (),
        *,
        moments: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
        ema_decay: float = 0.9999,
    ) -> None:
        self.settings = check_settings(betas, eps, weight_decay, max_norm, ema_decay)
        self.parameters, self.averages, self.copies = list(parameters), list(averages), list(copies)
        check_lists({"parameters": self.parameters})
        self.exp_avgs, self.exp_avg_sqs = (
            [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
            if moments is None
            else list(moments[i])
            for i in range(2)
        )
        device = self.parameters[0].device
        self.counters = torch.zeros(3, dtype=torch.int64, device=device)
        self.lr = torch.full((), lr, dtype=torch.float64, device=device)
        lists = self._lists([])
        del lists["gradients"]
        check_types(lists)
        check_lists(lists)
        check_apart(lists)
        self._table: TensorTable | None = None
        self._recorded: list[TensorTable] = []
        self._places: list[int] = []
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.parameters, strict=False):
                copy.copy_(parameter)

    @torch.no_grad()
    def update(
        self, gradients: Sequence[Tensor], norm: Tensor | None = None, *, zero_gradients: bool = False
    ) -> Tensor:
        """One step.

        Args:
            gradients: like the parameters, contiguous, all float32 or all bf16.
            norm: 0-d float32 on the device: of the gradients of all ranks, or NaN for a step that is to be skipped.
                Where it is not given, that of these gradients.
            zero_gradients: they are 0 afterwards, also where the step is skipped.

        Returns:
            the norm, 0-d float32 on the device.

        Raises:
            ValueError: a shape, type, device or stride is not as said, two tensors share memory, or the first step or
                new gradients come while a CUDA graph is captured; the message names it.
        """
        lists, table = self._found(gradients)
        if norm is None:
            norm = measure(gradients, table)
        check_numbers(self.counters, self.lr, norm, self.counters.device)
        apply_update(lists, self.counters, self.lr, norm, self.settings, zero_gradients, table)
        return norm

    @torch.no_grad()
    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """That of :func:`gradient_norm`, for an update whose norm is not these gradients' alone.

        Unlike there, where tensors lie goes to the device only once they have moved, so this can be captured, too.

        Raises:
            ValueError: as :meth:`update` does.
        """
        _, table = self._found(gradients)
        return measure(gradients, table)

    def _found(self, gradients: Sequence[Tensor]) -> tuple[dict[str, Sequence[Tensor]], TensorTable]:
        """All lists, checked, and where they lie."""
        check_lists({"parameters": self.parameters, "gradients": gradients})
        lists = self._lists(gradients)
        check_types(lists)
        places = [tensor.data_ptr() for tensors in lists.values() for tensor in tensors]
        if self._table is None:
            self._table = TensorTable.of(lists)
        elif places != self._places:
            self._table = self._table.following([*lists.values()])
        self._places = places
        if capturing(self.counters.device) and self._table not in self._recorded:
            # Replays read it, also once a step outside of the graph has made another table of other gradients.
            self._recorded.append(self._table)
        return lists, self._table

    def _lists(self, gradients: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        return named_lists(
            self.parameters, gradients, self.exp_avgs, self.exp_avg_sqs, self.averages, self.copies
        )  # fmt: skip

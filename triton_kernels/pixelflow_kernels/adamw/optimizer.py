"""AdamW with a moving average of a model's parameters, as an object that is created once and updated every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .op import apply_update, check_numbers, check_settings, check_types, measure, named_lists
from .table import TensorTable, capturing, check_apart, check_lists


class FusedAdamW:
    """AdamW with clipping, moving average and rounded copies, in four launches per step for any model.

    On CUDA, a step neither synchronises with the device nor depends on its results on the host. With static gradients
    it can be captured into a CUDA graph, after one step outside the capture. On a CPU, plain PyTorch computes the same.

    Args:
        parameters: float32, contiguous; updated in place.
        averages: like the parameters, moved towards them in place, starting from their current values; may be empty.
        copies: like the parameters, in bf16 or fp16, written in place; may be empty. They are filled on construction.
        moments: first and second moments to continue from, like the parameters, updated in place; default zeros.
        lr: learning rate; change it with ``optimizer.lr.fill_()``.
        betas, eps, weight_decay, max_norm, ema_decay: as in :func:`adamw_ema_`.

    Attributes:
        parameters, averages, copies: the given lists.
        exp_avgs, exp_avg_sqs: first and second moments, float32.
        counters: ``[3]`` int64 on the device: steps taken, steps skipped, and current number of steps skipped in a row.
            Reading them waits for the device, so read them late.
        lr: 0-d float64 on the device.

    Raises:
        ValueError: a number, shape, dtype, device or stride does not meet the requirements above, or two tensors share
            memory; the message names it.

    These tensors hold everything that a step depends on; to resume from a checkpoint, fill them in place.
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
        if not 0 <= lr < float("inf"):
            raise ValueError(f"lr: got {lr}, expected a finite number of 0 or more")
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
        """Perform one step.

        Args:
            gradients: like the parameters, contiguous, all float32 or all bf16.
            norm: 0-d float32 on the device: norm of the gradients of all ranks, or NaN to skip the step. Default: the
                norm of ``gradients``.
            zero_gradients: whether to set the gradients to 0, even if the step is skipped.

        Returns:
            The norm, 0-d float32 on the device.

        Raises:
            ValueError: a shape, dtype, device or stride does not meet the requirements above, two tensors share memory,
                or the first step or new gradients occur while a CUDA graph is captured; the message names it.
        """
        lists, table = self._found(gradients)
        if norm is None:
            norm = measure(gradients, table)
        check_numbers(self.counters, self.lr, norm, self.counters.device)
        apply_update(lists, self.counters, self.lr, norm, self.settings, zero_gradients, table)
        return norm

    @torch.no_grad()
    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Compute :func:`gradient_norm`, for an update whose norm includes other gradients, e.g. those of other ranks.

        Unlike the function, it uploads the tensors' addresses only if they have changed, so it can be captured too.

        Raises:
            ValueError: as in :meth:`update`.
        """
        _, table = self._found(gradients)
        return measure(gradients, table)

    def _found(self, gradients: Sequence[Tensor]) -> tuple[dict[str, Sequence[Tensor]], TensorTable]:
        """Return all lists, validated, and their table of addresses."""
        check_lists({"parameters": self.parameters, "gradients": gradients})
        lists = self._lists(gradients)
        check_types(lists)
        places = [tensor.data_ptr() for tensors in lists.values() for tensor in tensors]
        if self._table is None:
            self._table = TensorTable.of(lists)
        elif places != self._places:
            check_apart(lists)
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

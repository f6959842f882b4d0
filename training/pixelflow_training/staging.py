"""The copy of a state that a checkpoint is written from while training goes on, each rank's part of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor, Replicate

from .parallel import mine
from .ranks import Ranks

Tensors = dict[str, dict[str, Tensor]]


def share(tensors: Tensors, ranks: Ranks) -> Tensors:
    """What this rank writes. Of what several ranks have, one writes each tensor, so none copies all of it.

    Every rank decides alike: the largest tensors first, each to whoever has the fewest bytes so far.

    Args:
        tensors: a state by group and name, of the same names and shapes on all ranks.
        ranks: who writes together.
    """
    if ranks.alone:
        return tensors
    loads: dict[int, list[int]] = {}  # number of copies -> bytes that each of their holders writes
    mine: Tensors = {group: {} for group in tensors}
    everything = [(group, name, tensor) for group, members in tensors.items() for name, tensor in members.items()]
    for group, name, tensor in sorted(everything, key=lambda entry: -entry[2].nbytes):
        copies, holder = _copies(tensor, ranks)
        load = loads.setdefault(copies, [0] * copies)
        chosen = load.index(min(load))
        load[chosen] += tensor.nbytes
        if chosen == holder:
            mine[group][name] = tensor
    return {group: members for group, members in mine.items() if members}


def _copies(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """How many ranks have the same part of a tensor, and which of them this one is."""
    if not isinstance(tensor, DTensor):
        return ranks.world_size, ranks.rank
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None  # all ranks are in the mesh
    copies, holder = 1, 0
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            holder = holder * mesh.size(dim) + place[dim]
            copies *= mesh.size(dim)
    return copies, holder


class Stager(AsyncStager):
    """Copies a state to the CPU; the copy is whole when :meth:`stage` returns, and nothing changes it after that.

    From a GPU all tensors are copied one after the other into pinned memory, and waited for once. That memory is kept:
    whoever stages again has written the copy before.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._pinned: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def stage(self, state_dict: Tensors) -> Tensors:
        """A copy on the CPU."""
        devices = {tensor.device for members in state_dict.values() for tensor in members.values()}
        copies: Tensors = {
            group: {name: self._copy((group, name), tensor) for name, tensor in members.items()}
            for group, members in state_dict.items()
        }
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies

    def synchronize_staging(self) -> None:
        """Nothing: :meth:`stage` has waited."""

    def close(self) -> None:
        """Let go of the pinned memory."""
        self._pinned.clear()

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        on_gpu = tensor.device.type == "cuda"
        copy = self._pinned.get(key)
        if copy is None:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu, requires_grad=False)
            if on_gpu:
                self._pinned[key] = copy
        mine(copy).copy_(mine(tensor), non_blocking=on_gpu)
        return copy

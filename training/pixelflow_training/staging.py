"""Copies of the state from which checkpoints are written during training, divided over ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor, Replicate

from .parallel import mine
from .ranks import Ranks

Tensors = dict[str, dict[str, Tensor]]


def share(tensors: Tensors, ranks: Ranks) -> Tensors:
    """Select the tensors that this rank writes. Of tensors held by several ranks, one rank writes each.

    No rank therefore copies everything. All ranks compute the same assignment: tensors are taken in descending order of
    size, each assigned to the holder with the fewest bytes so far.

    Args:
        tensors: a state by group and name, with the same names and shapes on all ranks.
        ranks: the ranks that write together.
    """
    if ranks.alone:
        return tensors
    loads: dict[int, list[int]] = {}  # number of copies -> bytes assigned to each holder
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
    """Return how many ranks hold the same part of a tensor, and the index of this rank among them."""
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
    """Copies a state to the CPU. The copy is complete when :meth:`stage` returns and is independent of the state.

    From a GPU, all tensors are copied asynchronously into pinned memory, followed by a single synchronization. The
    pinned memory is reused: the previous copy must have been written before :meth:`stage` is called again.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._pinned: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def stage(self, state_dict: Tensors) -> Tensors:
        """Return a copy on the CPU."""
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
        """Do nothing: :meth:`stage` has already synchronized."""

    def close(self) -> None:
        """Release the pinned memory."""
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

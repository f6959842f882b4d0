"""Where the tensors of a model lie, as numbers on their device: one launch reads and writes all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

CHUNK = 16384
"""Values of a tensor that one program works on: a multiple of every block, and of 16, which keeps it aligned."""


@dataclass(frozen=True, eq=False, slots=True)
class TensorTable:
    """Addresses of lists of tensors that belong together one by one, and how their values are shared out.

    It holds no tensors, so that a gradient that is made anew in each step is not kept: where lists are used, their
    addresses are compared with it (:meth:`following`).

    Attributes:
        pointers: ``[L, n]`` int64, on the tensors' device: of each list, each tensor's address.
        known: the same on the host.
        chunks: ``[3, C]`` int64, on the device: of each chunk its tensor's number, its first value in that tensor, and
            how many it has, at most ``CHUNK``. They are in order; a tensor without values has none.
    """

    pointers: Tensor
    known: Tensor
    chunks: Tensor

    @classmethod
    def of(cls, lists: Mapping[str, Sequence[Tensor]]) -> TensorTable:
        """The table of some lists by name; the first decides number, shapes and device.

        Raises:
            ValueError: a list is empty or of another length; a tensor has another shape or device than the first
                list's, another type than its own list's, or gaps; or two share memory. The message names it.
        """
        check_lists(lists)
        check_apart(lists)
        first = next(iter(lists.values()))
        rows = [
            (number, start, min(CHUNK, tensor.numel() - start))
            for number, tensor in enumerate(first)
            for start in range(0, tensor.numel(), CHUNK)
        ]
        chunks = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T.contiguous()
        known, device = _addresses([*lists.values()]), first[0].device
        return cls(_upload(known, device), known, _upload(chunks, device))

    def following(self, lists: Sequence[Sequence[Tensor]]) -> TensorTable:
        """The table of other tensors of the same shapes: itself where none has moved.

        New addresses go to the device without waiting for it.

        Raises:
            ValueError: a tensor has moved while a CUDA graph is captured, which would record where it is just now.
        """
        found = _addresses(lists)
        if torch.equal(found, self.known):
            return self
        return replace(self, pointers=_upload(found, self.pointers.device), known=found)


def check_lists(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Tensors of the first list's shapes and device; each list of one type; all contiguous.

    Raises:
        ValueError: names the list and the tensor's number.
    """
    (main, first), *_ = lists.items()
    if len(first) == 0:
        raise ValueError(f"{main}: got no tensors, expected at least one")
    device = first[0].device
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise ValueError(f"{name}: got {len(tensors)} tensors, expected {len(first)}, as many as {main}")
        for i, (tensor, like) in enumerate(zip(tensors, first, strict=True)):
            if type(tensor) not in (Tensor, Parameter):
                raise ValueError(
                    f"{name}[{i}]: got {type(tensor).__name__}, expected a plain tensor (a shard's to_local())"
                )
            if tensor.shape != like.shape:
                raise ValueError(f"{name}[{i}]: got shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
            if tensor.dtype != tensors[0].dtype:
                raise ValueError(f"{name}[{i}]: got {tensor.dtype}, expected the type of {name}[0], {tensors[0].dtype}")
            if tensor.device != device:
                raise ValueError(f"{name}[{i}]: got device {tensor.device}, expected that of {main}[0] ({device})")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{i}]: got strides {tensor.stride()}, expected a contiguous tensor")


def check_apart(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """No two tensors share memory: programs that work side by side would write the same value.

    Raises:
        ValueError: names both.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, f"{name}[{i}]")
        for name, tensors in lists.items()
        for i, tensor in enumerate(tensors)
        if tensor.numel() > 0
    )
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(f"{other}: got memory that is also that of {one}, expected tensors that share none")


def capturing(device: torch.device) -> bool:
    """Whether launches on this device are recorded in a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[L, n]`` int64 on the host."""
    return torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in lists], dtype=torch.int64)


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; to a CUDA device from pinned memory, so that nothing waits."""
    if device.type != "cuda":
        return numbers.clone()
    if capturing(device):
        raise ValueError(
            "tensors: got some that are new or have moved while a CUDA graph is captured, expected static ones: keep "
            "the gradients' memory, and make one update before the capture"
        )
    return numbers.pin_memory().to(device, non_blocking=True)

"""Tables of tensor addresses on the device, with which one launch reads and writes all tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from pixelflow_kernels.transfers import uploaded

CHUNK = 16384
"""Number of values per program: a multiple of every block size, and of 16, which preserves alignment."""


@dataclass(frozen=True, eq=False, slots=True)
class TensorTable:
    """Addresses of parallel lists of tensors, and the division of their values into chunks.

    The table holds no tensors, so gradients that are newly allocated in each step are not kept alive. Instead, whenever
    lists are used, their addresses are compared with those of the table (:meth:`following`).

    Attributes:
        pointers: ``[L, n]`` int64, on the tensors' device: the address of each tensor of each list.
        known: the same on the host.
        chunks: ``[3, C]`` int64, on the device: for each chunk, its tensor's index, its first value in that tensor, and
            its number of values, at most ``CHUNK``. Chunks are in order; a tensor without values has none.
    """

    pointers: Tensor
    known: Tensor
    chunks: Tensor

    @classmethod
    def of(cls, lists: Mapping[str, Sequence[Tensor]]) -> TensorTable:
        """Create the table of named lists; the first determines number, shapes and device of the tensors.

        Raises:
            ValueError: the first list is empty, or another has a different length; a tensor differs in shape or device
                from that of the first list, or in dtype from its own list; a tensor is not plain or not contiguous; or
                two share memory. The message names it.
        """
        check_lists(lists)
        check_apart(lists)
        first = next(iter(lists.values()))
        rows = [
            (number, start, min(CHUNK, tensor.numel() - start))
            for number, tensor in enumerate(first)
            for start in range(0, tensor.numel(), CHUNK)
        ]
        chunks = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 3).T.contiguous()
        known, device = _addresses([*lists.values()]), first[0].device
        return cls(_upload(known, device), known, _upload(chunks, device))

    def following(self, lists: Sequence[Sequence[Tensor]]) -> TensorTable:
        """Return the table for other tensors of the same shapes, which is this table if no address has changed.

        New addresses are uploaded without synchronising with the device.

        Raises:
            ValueError: an address has changed while a CUDA graph is captured, which would record the current address.
        """
        found = _addresses(lists)
        if torch.equal(found, self.known):
            return self
        return replace(self, pointers=_upload(found, self.pointers.device), known=found)


def check_lists(lists: Mapping[str, Sequence[Tensor]]) -> None:
    """Require plain, contiguous tensors with the first list's shapes and device, and a single dtype per list.

    Raises:
        ValueError: a requirement is not met; the message names the list and, where it applies, the tensor's index.
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
    """Require that no two tensors share memory, because concurrent programs would write the same value.

    Raises:
        ValueError: two tensors share memory; the message names both.
    """
    spans = sorted(
        (at := tensor.data_ptr(), at + tensor.nbytes, name, i)
        for name, tensors in lists.items()
        for i, tensor in enumerate(tensors)
        if tensor.numel() > 0
    )
    for (_, end, one, i), (start, _, other, k) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"{other}[{k}]: got memory that is also that of {one}[{i}], expected tensors that share none"
            )


def capturing(device: torch.device) -> bool:
    """Whether launches on this device are recorded in a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the tensors' addresses as ``[L, n]`` int64 on the host."""
    rows = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; for CUDA from pinned memory, so that the host does not wait."""
    if device.type != "cuda":
        return numbers.clone()
    if capturing(device):
        raise ValueError(
            "tensors: got some that are new or have moved while a CUDA graph is captured, expected static ones: keep "
            "the gradients' memory, and make one update before the capture"
        )
    return uploaded(numbers, device)

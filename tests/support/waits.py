"""What makes the host wait for a device, apart from copies that say so: a graph can capture none of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "masked_select",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc",
}  # fmt: skip
"""Operations that read values, or whose shapes depend on values."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
TRUTHS = (torch.bool, torch.uint8)


def name_of(operation: Any) -> str:
    """Return an operation's name without its namespace and overload."""
    name: str = operation._schema.name.split("::")[-1]
    return name


def waits(operation: Any, args: Sequence[Any], kwargs: Any, on_device: Callable[[Tensor], bool]) -> str | None:
    """Return what the host waits for, or None; copies are not looked at.

    Args:
        operation, args, kwargs: as a dispatch mode is given them.
        on_device: whether a tensor is on the device.
    """
    name = name_of(operation)
    if name in READS:
        return name
    if name == "repeat_interleave" and operation._overloadname == "Tensor" and kwargs.get("output_size") is None:
        return "repeat_interleave without its output_size"
    if name in INDEXING and on_device(args[0]):
        return _indexing([x for x in args[1] if x is not None], args[2:3], on_device)
    return None


def _indexing(indices: list[Tensor], value: Sequence[Tensor], on_device: Callable[[Tensor], bool]) -> str | None:
    """Return what ``x[indices]`` waits for, or ``x[indices] = value``."""
    masks = [x for x in indices if x.dtype in TRUTHS and on_device(x)]
    if len(indices) == len(masks) == len(value) == 1 and not on_device(value[0]):
        return None  # a number where a mask is true: masked_fill_
    if masks:
        return "an index of truth values"
    # Truths of the host are counted there, and their places are sent from page-locked memory; all else is waited for.
    sent = [x for x in indices if x.dtype not in TRUTHS]
    return None if all(on_device(x) for x in (*sent, *value)) else "an index or a number of the host"

"""What to say when a device's memory is too small."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .config import ModelConfig
from .plan import StagePlan

WIDEST = 8
"""Tensors ``[T, C]`` that live where an evaluation on fused kernels is widest, in an attention: the residual stream and
its norm, the product of queries, keys and values (as wide as three), queries and keys, turned, and the result."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def least_bytes(model: ModelConfig, stages: Sequence[StagePlan], dtype: torch.dtype) -> int:
    """What a sampling needs at least beside the weights: the widest moment of its largest stage.

    The table of modulations counts, the state, a few numbers a pixel, does not.

    Args:
        model: its shape.
        stages: what will run.
        dtype: of products.
    """
    return max((_stage_values(model, stage) for stage in stages), default=0) * dtype.itemsize


def _stage_values(model: ModelConfig, stage: StagePlan) -> int:
    """Values of ``dtype`` that live at once."""
    sizes = [h * w // model.patch_size**2 for count, _, h, w in stage.shapes for _ in range(count)]
    tokens = sum(sizes[: stage.guided]) + sum(sizes)
    modulations = stage.num_steps * len(sizes) * (6 * model.depth + 2)
    return (WIDEST * tokens + modulations) * model.width


@contextmanager
def told_what_fits(device: torch.device, images: int, least: int = 0) -> Iterator[None]:
    """Raise an out-of-memory error again, of its own type, with about how many images would have fitted.

    The estimate: what these images had when one allocation more failed, with that allocation, divided among them; or
    what they need at least, where that is more: they may have failed long before they needed most, in a small stage or
    at the beginning of a large one.

    Args:
        device: where they are computed.
        images: that run together.
        least: bytes that they need together, by :func:`least_bytes`.

    Raises:
        torch.cuda.OutOfMemoryError: with a message that says so.
        MemoryError: the host's memory is too small; its allocator does not say how much there was.
    """
    before = allocated(device)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        had = max(allocated(device) - before, 0)  # the error holds frames, and they hold the failed call's tensors
        each = max(had + tried(str(error)), least) / images
        fit = min(int((had + free(device)) / each), images - 1) if each > 0 else images - 1
        if fit < 1:
            advice = "not even one would fit: free memory, or ask for a smaller height and width"
        else:
            advice = f"about {fit} would fit in one batch (batch_sizes=[{fit}] divides larger calls)"
        message = f"out of memory: {images} images at once, about {each / 2**20:.0f} MiB each; {advice}. {error}"
        raise torch.cuda.OutOfMemoryError(message) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # the host's allocator has no type of its own
            raise
        message = f"out of memory: {images} images at once; ask for fewer, or for a smaller height and width. {error}"
        raise MemoryError(message) from error


def tried(message: str) -> int:
    """Bytes that PyTorch's message says it tried to allocate; 0 where it does not say."""
    found = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on a CUDA device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device) -> int:
    """Bytes that PyTorch can still have there: the device's free ones, and those that it keeps but does not use."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

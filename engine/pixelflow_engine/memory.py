"""What to say when a device's memory is too small."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@contextmanager
def told_what_fits(device: torch.device, images: int) -> Iterator[None]:
    """Raise an out-of-memory error again, of its own type, with about how many images would have fitted.

    The estimate: what these images had when one allocation more failed, with that allocation, divided among them. They
    may have needed still more later, so it errs on the large side.

    Args:
        device: where they are computed.
        images: that run together.

    Raises:
        torch.cuda.OutOfMemoryError: with a message that says so.
    """
    before = allocated(device)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        had = max(allocated(device) - before, 0)  # the error holds frames, and they hold the failed call's tensors
        each = (had + tried(str(error))) / images
        fit = min(int((had + free(device)) / each), images - 1) if each > 0 else images - 1
        if fit < 1:
            advice = "not even one would fit: free memory, or ask for a smaller height and width"
        else:
            advice = f"about {fit} would fit in one batch (batch_sizes=[{fit}] divides larger calls)"
        message = f"out of memory: {images} images at once, about {each / 2**20:.0f} MiB each; {advice}. {error}"
        raise torch.cuda.OutOfMemoryError(message) from error


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

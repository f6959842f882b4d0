"""Advice for out-of-memory errors: an estimate of how many images would fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .config import ModelConfig
from .plan import StagePlan

WIDEST = 8
"""Number of tensors ``[T, C]`` alive at the peak of an evaluation on fused kernels, inside an attention: the residual
stream and its norm, the product of queries, keys and values (counted as three), rotated queries and keys, and the
result."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def least_bytes(model: ModelConfig, stages: Sequence[StagePlan], dtype: torch.dtype, table: bool) -> int:
    """Lower bound on the memory of a sampling run besides the weights: the peak of its largest stage.

    The state, a few values per pixel, is not included.

    Args:
        model: the model's shape.
        stages: plans of the stages that will run.
        dtype: dtype of matrix products.
        table: whether every stage has a table of modulations (:class:`.stage_pack.ModulationTable`), as for fixed steps
            on the fast path.
    """
    return max((_stage_values(model, stage, table) for stage in stages), default=0) * dtype.itemsize


def _stage_values(model: ModelConfig, stage: StagePlan, table: bool) -> int:
    """Number of values of ``dtype`` alive at the peak of a stage."""
    sizes = [h * w // model.patch_size**2 for count, _, h, w in stage.shapes for _ in range(count)]
    tokens = sum(sizes[: stage.guided]) + sum(sizes)
    values = WIDEST * tokens
    if table:  # at least one row per step, for each image of a model with classes and shared by the images of others
        rows = stage.num_steps * (len(sizes) if model.num_classes > 0 else 1)
        values += rows * (6 * model.depth + 2)
    return values * model.width


@contextmanager
def told_what_fits(device: torch.device, images: int, least: int = 0) -> Iterator[None]:
    """Re-raise an out-of-memory error, with its own type, stating about how many images would have fitted.

    The memory per image is estimated as the larger of two values: what the images held when an allocation failed, plus
    that allocation; and ``least``, because the failure may have happened long before the peak, in a small stage or at
    the beginning of a large one. Both are divided by the number of images.

    Args:
        device: the device that runs the images.
        images: number of images that run together.
        least: lower bound on the bytes that they need together, from :func:`least_bytes`.

    Raises:
        torch.cuda.OutOfMemoryError: with the estimate in its message.
        MemoryError: the host has too little memory; its allocator does not report how much there was.
    """
    before = allocated(device)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        had = max(allocated(device) - before, 0)  # the traceback's frames still hold the failed call's tensors
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
    """Bytes that PyTorch reports it tried to allocate; 0 if the message does not say."""
    found = re.search(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", message)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def allocated(device: torch.device) -> int:
    """Bytes allocated to tensors on a CUDA device; 0 on other devices."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device) -> int:
    """Bytes still available to PyTorch; 0 without CUDA.

    Memory that it may still reserve, which is what the device has and ``set_per_process_memory_fraction`` allows, and
    memory that is reserved but unused.
    """
    if device.type != "cuda":
        return 0
    on_device, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return max(min(on_device, allowed), 0) + reserved - torch.cuda.memory_allocated(device)

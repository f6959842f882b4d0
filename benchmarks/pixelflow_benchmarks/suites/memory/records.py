"""What a record of memory says.

A record of kind ``memory`` has ``case``, ``variant`` and, unless it has a ``fault``:

==================== ==================================================================================================
``weights_bytes``    parameters, and buffers that are made of them once
``activation_bytes`` what is beside them at the peak
``peak_bytes``       both
``per_image_bytes``  what one further image of the batch adds: the slope from the smallest batch to the largest
``pool_bytes``       of the activations, what graphs hold; on a GPU with graphs
``reserved_bytes``   what PyTorch had taken from the GPU at the peak, all opponents' weights included
``resident_bytes``   by how much the process grew, for the system; on a CPU
``gradient_bytes``   of the activations of a training step
``counted``          nothing ran: the account of fake tensors
==================== ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pixelflow_benchmarks.harness.results import Record


def size_of(module: nn.Module) -> int:
    """Bytes of its parameters and buffers; what several share is there once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def memory_head(shape: str, work: str, batch: int, variant: str, *, counted: bool) -> Record:
    """What says whose record it is.

    Args:
        shape: of the model.
        work: what is done: ``stage 3``, ``training``.
        batch: images at once.
        variant: who does it.
        counted: on fake tensors.
    """
    case = f"{shape}, {work}, batch {batch}"
    named = {"case": case, "variant": variant, "shape": shape, "work": work, "batch": batch}
    return {"kind": "memory", **named, "counted": counted}


def memory_figures(weights: int, activations: int, **more: Any) -> Record:
    """The bytes of a record."""
    return {
        "weights_bytes": weights,
        "activation_bytes": activations,
        "peak_bytes": weights + activations,
        **more,
    }


def skipped(shape: str, work: str, variants: Iterable[str]) -> Record:
    """That no time was left for this work, whatever its batch."""
    case = f"{shape}, {work}"
    return {"kind": "skipped", "case": case, "variants": list(variants), "reason": "no time was left"}


def with_slopes(records: Iterable[Record]) -> Iterator[Record]:
    """The same records; those of two batches or more of one work and variant with what one further image adds."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["shape"], record["work"], record["variant"]), []).append(record)
    for group in groups.values():
        known = sorted((r["batch"], r["peak_bytes"]) for r in group if "peak_bytes" in r)
        if len(known) > 1 and known[-1][0] > known[0][0]:
            slope = (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])
            for record in group:
                if "peak_bytes" in record:
                    record["per_image_bytes"] = round(slope)
        yield from group

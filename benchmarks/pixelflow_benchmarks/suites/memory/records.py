"""Records of kind ``memory``.

A record has ``case``, ``variant`` and ``counted`` (whether nothing ran and the bytes are those of fake tensors). Unless
it has a ``fault``, it also has:

==================== ==================================================================================================
``weights_bytes``    parameters, and buffers that are made from them once
``activation_bytes`` everything else at the peak
``peak_bytes``       the sum of both
``per_image_bytes``  what a further image of the batch adds: the slope from the smallest batch to the largest; only with
                     two batches or more
``pool_bytes``       the part of the activations that graphs hold; on a GPU with graphs
``reserved_bytes``   what PyTorch had reserved on the GPU at the peak, the weights of all opponents included
``resident_bytes``   growth of the process as the system sees it; on a CPU
``gradient_bytes``   the part of a training step's activations that are gradients
==================== ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pixelflow_benchmarks.harness.results import Record


def size_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers; shared storages count once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def memory_head(shape: str, work: str, batch: int, variant: str, *, counted: bool) -> Record:
    """Return the fields that identify a record.

    Args:
        shape: shape of the model.
        work: what is run: ``stage 3``, ``training``.
        batch: number of images.
        variant: name of the variant.
        counted: whether the bytes are counted on fake tensors.
    """
    case = f"{shape}, {work}, batch {batch}"
    named = {"case": case, "variant": variant, "shape": shape, "work": work, "batch": batch}
    return {"kind": "memory", **named, "counted": counted}


def memory_figures(weights: int, activations: int, **more: Any) -> Record:
    """Return the fields of a record that hold bytes."""
    return {
        "weights_bytes": weights,
        "activation_bytes": activations,
        "peak_bytes": weights + activations,
        **more,
    }


def skipped(shape: str, work: str, variants: Iterable[str]) -> Record:
    """Return the record which says that no time was left for this work, at any batch size."""
    case = f"{shape}, {work}"
    return {"kind": "skipped", "case": case, "variants": list(variants), "reason": "no time was left"}


def with_slopes(records: Iterable[Record]) -> Iterator[Record]:
    """Yield the records, grouped by shape, work and variant; groups of several batch sizes get ``per_image_bytes``."""
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

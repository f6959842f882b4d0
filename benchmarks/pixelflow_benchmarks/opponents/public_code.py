"""Run a checkout of the published code in its own process: ``python -m pixelflow_benchmarks.opponents.public_code``.

The checkout is optional and nothing of it is copied here: it is imported from its folder, with its own dependencies. It
runs in a process of its own so that these packages are not loaded beside the project's, and because it prints freely.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pixelflow_benchmarks.harness.tracing import fake, fake_cuda, fake_parameters, tracing
from pixelflow_benchmarks.suites.kernels.case import HEAD_DIM, HEADS, WIDTH

from .published import import_published, rotary_places


def trace(path: Path, sequences: int, side: int) -> list[dict[str, Any]]:
    """Trace a published block under bf16 autocast; its position table is on the CPU, as in the published sampler."""
    published = import_published(path, "pixelflow.model")
    places = rotary_places(side, HEAD_DIM)
    with torch.device("meta"):
        block = published.TransformerBlock(WIDTH, HEADS, HEAD_DIM, attention_bias=True).eval()
    with fake_cuda():
        weights = fake_parameters(block, torch.float32)
        x = fake((sequences, side * side, WIDTH), torch.bfloat16)
        conditioning = fake((sequences, WIDTH), torch.bfloat16)
        table = torch.empty(places.shape, dtype=places.dtype)
        with tracing(weights, torch.bfloat16) as found:
            block(x, timestep=conditioning, rope_pos_embed=table)
    return [asdict(op) for op in found.ops]


def serve(make: Callable[[], Any]) -> None:
    """Answer requests, one line of JSON each, until stdin ends; ``do`` names a method of what ``make`` returns."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        server = make()
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(server, request.pop("do"))(**request)), file=answers, flush=True)


def main(arguments: list[str]) -> None:
    """Run a command line.

    ``trace PATH SEQUENCES SIDE`` prints JSON on the last line of the output. ``sample PATH SHAPE DTYPE DEVICE`` and
    ``train PATH SHAPE DTYPE DEVICE`` answer requests.
    """
    command, path, *rest = arguments
    if command == "sample":
        from .public_sampling import SamplingServer

        serve(lambda: SamplingServer(Path(path), *rest))
        return
    if command == "train":
        from .public_training import TrainingServer

        serve(lambda: TrainingServer(Path(path), *rest))
        return
    sequences, side = map(int, rest)
    with contextlib.redirect_stdout(sys.stderr):
        found = trace(Path(path), sequences, side)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])

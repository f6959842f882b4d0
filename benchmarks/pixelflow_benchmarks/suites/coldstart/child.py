"""One cold start: a process that goes from nothing to two images and reports how long each phase took.

``python -m pixelflow_benchmarks.suites.coldstart.child JOB`` takes a job as JSON, see :class:`~.job.Job`, and prints
one line of JSON. Modules that are slow to import are imported inside the timed phases and nowhere before.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the job given as the first command-line argument and print its result."""
    arrived = time.monotonic()
    print(json.dumps(start(json.loads(sys.argv[1]), arrived)))


def start(job: dict[str, Any], arrived: float) -> dict[str, Any]:
    """Run a job.

    Args:
        job: the fields of :class:`~.job.Job`, and ``began``, the time at which the process was started.
        arrived: time at which the process reached :func:`main`. Both are on the clock of ``time.monotonic``.

    Returns:
        ``seconds`` by phase; with torch.compile also ``graphs_compiled`` and ``cache_hits``.
    """
    seconds: dict[str, float] = {"interpreter": arrived - job["began"]}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        seconds[name] = time.monotonic() - began

    with phase("import torch"):
        import torch
    with phase("import engine"):
        from pixelflow_engine import Checkpoint, PixelFlowEngine, load_checkpoint  # named: the package itself is lazy
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    if device.type == "cuda":
        with phase("CUDA context"):
            torch.zeros(1, device=device)
            torch.cuda.synchronize(device)
    with phase("load checkpoint"):
        checkpoint = load_checkpoint(job["checkpoint"])
        state = {name: tensor.to(device, dtype) for name, tensor in checkpoint.state_dict.items()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with phase("build engine"):
        engine = PixelFlowEngine.from_checkpoint(
            Checkpoint(checkpoint.config, state, checkpoint.source),
            device,
            dtype,
            job["backend"],
            compile=job["compile"],
            graphs=job["graphs"],
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def image() -> Any:
        made: Any = engine(
            job["labels"],
            num_inference_steps=job["steps"],
            guidance_scale=job["guidance_scale"],
            seed=job["seed"],
            output_type="pt",
        ).images
        return made.cpu()

    with phase("first image"):
        first = image()
    seconds["until the first image"] = time.monotonic() - job["began"]
    compiled = _compiled() if job["compile"] else {}
    with phase("second image"):
        second = image()
    if job["graphs"]:
        for batch in job["warmup"]:
            engine.close()
            with phase(f"capture, batch {batch}"):
                engine.warmup((batch,), guidance_scale=job["guidance_scale"])
                torch.cuda.synchronize(device)
    torch.save([first, second], Path(job["images"]))
    return {"seconds": seconds, **compiled}


def _compiled() -> dict[str, int]:
    """Return how many graphs torch.compile has compiled so far, and how often it found one in its caches."""
    from torch._dynamo.utils import counters

    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    return {"graphs_compiled": int(counters["stats"]["unique_graphs"]), "cache_hits": int(hits)}


if __name__ == "__main__":
    main()

"""A process that is started to be timed: what it is told, where it may leave files, what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CHILD = "pixelflow_benchmarks.suites.coldstart.child"


class ChildError(RuntimeError):
    """A process failed; the message is the last line that it said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a cold start does.

    Attributes:
        checkpoint: a folder that is loaded.
        device, dtype, backend, compile, graphs: of the engine.
        steps, labels, guidance_scale, seed: of the call that makes the images.
        images: the file that they are written to.
        warmup: batches whose capture is timed in the end, where there are graphs.
    """

    checkpoint: str
    device: str
    dtype: str
    backend: str
    compile: bool
    graphs: bool
    steps: int
    images: str
    labels: list[int] = field(default_factory=lambda: [0])
    guidance_scale: float = 2.4
    seed: int = 0
    warmup: list[int] = field(default_factory=list)


def cold_start(job: Job, cache: Path) -> dict[str, Any]:
    """Do a job in a process of its own.

    Args:
        job: what to do.
        cache: where compilers keep what they made; an empty folder, or one that was filled before.

    Returns:
        what the child says, see :func:`~.child.start`.

    Raises:
        ChildError: it failed.
    """
    told = json.dumps(asdict(job) | {"began": time.monotonic()})
    said = run_process([sys.executable, "-m", CHILD, told], caches(cache))
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def caches(folder: Path) -> dict[str, str]:
    """Variables that send what compilers keep, and all temporary files, into a folder."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
    for name in names.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {variable: str(folder / name) for variable, name in names.items()}


def seconds_of_process(command: Sequence[str], expected: str) -> float:
    """Wall time of a process from its start to its end.

    Args:
        command: program and arguments.
        expected: what it must say.

    Raises:
        ChildError: it failed, or said something else.
    """
    began = time.monotonic()
    said = run_process(command, {})
    seconds = time.monotonic() - began
    if expected not in said:
        raise ChildError(f"{expected!r} is not in what it said")
    return seconds


def run_process(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """What a process prints.

    Raises:
        ChildError: it ends with another status than 0.
    """
    roots = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": roots, **variables}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        said = run.stderr.strip() or run.stdout.strip() or f"status {run.returncode}, without a word"
        raise ChildError(said.splitlines()[-1])
    return run.stdout

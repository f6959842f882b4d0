"""Processes that are started to be timed: their job, the folder for their caches and their answer."""

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
    """A process failed, or did not print what was expected; a failed process's last line of output is the message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Settings of one cold start.

    Attributes:
        checkpoint: folder of the checkpoint to load.
        device, dtype, backend, compile, graphs: settings of the engine.
        steps, labels, guidance_scale, seed: arguments of the call that makes the images.
        images: file that the images are written to.
        warmup: batch sizes whose graph capture is timed at the end; only with ``graphs``.
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
    """Run a job in a new process.

    Args:
        job: the job.
        cache: folder for compiler caches: empty, or filled by an earlier process.

    Returns:
        The child's answer, see :func:`~.child.start`.

    Raises:
        ChildError: the process failed.
    """
    told = json.dumps(asdict(job) | {"began": time.monotonic()})
    said = run_process([sys.executable, "-m", CHILD, told], caches(cache))
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


def caches(folder: Path) -> dict[str, str]:
    """Return environment variables that redirect compiler caches and temporary files to subfolders, which are made."""
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TMPDIR": "tmp"}
    for name in names.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {variable: str(folder / name) for variable, name in names.items()}


def seconds_of_process(command: Sequence[str], expected: str) -> float:
    """Measure the wall time of a process from its start to its end.

    Args:
        command: program and arguments.
        expected: text that must occur in its standard output.

    Raises:
        ChildError: the process failed, or ``expected`` is not in its output.
    """
    began = time.monotonic()
    said = run_process(command, {})
    seconds = time.monotonic() - began
    if expected not in said:
        raise ChildError(f"{expected!r} is not in what it said")
    return seconds


def run_process(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run a process and return its standard output.

    Raises:
        ChildError: the exit status is not 0.
    """
    roots = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": roots, **variables}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        said = run.stderr.strip() or run.stdout.strip() or f"status {run.returncode}, without a word"
        raise ChildError(said.splitlines()[-1])
    return run.stdout

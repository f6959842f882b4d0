"""The published code as an opponent: its process answers one request at a time, so it takes turns with the others."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from pixelflow_engine import PixelFlowConfig

from .random_models import SHAPES

GRACE = 10.0
"""Seconds that a process gets to exit by itself, and again after it was told to, before it is killed."""


class PublicProcess:
    """A checkout of the published code in a process of its own, with the same random weights.

    Args:
        path: the checkout.
        config: configuration of the model, one of :data:`~.random_models.SHAPES`.
        dtype: bfloat16 by autocast, or float32.
        device: where the model runs.
        serve: what the process serves, ``sample`` or ``train``.

    Raises:
        RuntimeError: the process does not start; the message contains the last line of its stderr.
    """

    def __init__(
        self,
        path: Path,
        config: PixelFlowConfig,
        dtype: torch.dtype,
        device: torch.device,
        serve: Literal["sample", "train"] = "sample",
    ) -> None:
        shape = next(name for name, known in SHAPES.items() if known == config)
        self.folder = tempfile.TemporaryDirectory(prefix="pixelflow-public-")
        self.said = Path(self.folder.name) / "stderr"
        command = [sys.executable, "-m", "pixelflow_benchmarks.opponents.public_code", serve, str(path)]
        command += [shape, str(dtype).removeprefix("torch."), str(device)]
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        try:
            self.ask({"do": "hello"})
        except RuntimeError:
            self.close()
            raise

    @property
    def ended(self) -> bool:
        """Whether the process has exited."""
        return self.process.poll() is not None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            RuntimeError: the process has ended; the message contains the last line of its stderr.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = self.said.read_text().strip().splitlines() or ["nothing"]
            raise RuntimeError(f"public: the published code's process ended: {said[-1]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """Close the process's stdin, end it if it does not exit by itself, and remove its temporary folder."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # requests that it no longer reads
                self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._end()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.folder.cleanup()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

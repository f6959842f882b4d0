"""The published code as an opponent: its process answers one request at a time, so that it takes turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .random_models import SHAPES
from .stage_runs import Ran, StageProblem


class PublicProcess:
    """A checkout of the published code in a process of its own, with the same random weights.

    Args:
        path: the checkout.
        problem: whose model, type and device it takes.

    Raises:
        RuntimeError: it does not start; the message has the last line of what it said.
    """

    def __init__(self, path: Path, problem: StageProblem) -> None:
        shape = next(name for name, config in SHAPES.items() if config == problem.config)
        self.folder = tempfile.TemporaryDirectory(prefix="pixelflow-public-")
        self.said = Path(self.folder.name) / "stderr"
        command = [sys.executable, "-m", "pixelflow_benchmarks.public_code", "serve", str(path)]
        command += [shape, str(problem.dtype).removeprefix("torch."), str(problem.device)]
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.ask({"do": "hello"})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request, wait for the answer."""
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
        """End it."""
        if self.process.stdin is not None and self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.folder.cleanup()


class PublicRun:
    """A stage by the published code's Euler steps, see :class:`pixelflow_benchmarks.stage_runs.StageRun`.

    Raises:
        NotImplementedError: the solver is another.
    """

    def __init__(self, process: PublicProcess, problem: StageProblem) -> None:
        if problem.solver != "euler":
            raise NotImplementedError("public: only its Euler steps are run")
        self.process = process
        self.problem = problem
        process.ask({"do": "prepare", "stage": problem.stage, "batch": problem.batch, "steps": problem.steps})

    def run(self, keep_first: bool = False) -> Ran:
        """See :class:`pixelflow_benchmarks.stage_runs.StageRun`; waits until it is done."""
        file = Path(self.process.folder.name) / "states.pt"
        self.process.ask({"do": "run", "keep": str(file) if keep_first else None})
        first = end = torch.zeros(1)
        if keep_first:
            states = torch.load(file, weights_only=True)
            first, end = states["first"].to(self.problem.device), states["end"].to(self.problem.device)
        return Ran(first if keep_first else None, end, self.problem.steps, self.problem.steps)

    def close(self) -> None:
        """Nothing to release: the process serves the next problem."""

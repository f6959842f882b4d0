"""The published training step, run in the process of its checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_kernels import PackedLayout
from pixelflow_training.collate import Batch

from .phases import Phases
from .problem import Gradients, Stepped, TrainingProblem


class PublicRun:
    """The published code's training step, see :class:`~.problem.TrainingRun`.

    Args:
        process: process that serves training, see :mod:`pixelflow_benchmarks.opponents.public_training`.
        problem: the training problem.

    Attributes:
        reported: loss and gradient norm of the last step; zeros before the first.
    """

    def __init__(self, process: PublicProcess, problem: TrainingProblem) -> None:
        self.process, self.problem = process, problem
        self.reported = Stepped(0.0, 0.0)
        process.ask({"do": "prepare", "batch": problem.batch})

    def draw(self) -> Batch:
        """See :class:`~.problem.TrainingRun`."""
        found = self._kept("draw")
        return Batch(
            tokens=found["tokens"],
            targets=found["targets"],
            layout=PackedLayout.from_grids([(side, side) for side in found["sizes"].tolist()]),
            t_model=found["t_model"],
            labels=found["labels"] if self.problem.config.model.num_classes > 0 else None,
            latent_size=found["sizes"],
            stage=found["stage"],
        )

    def gradients(self, batch: Batch) -> Gradients:
        """See :class:`~.problem.TrainingRun`."""
        given = Path(self.process.folder.name) / "batch.pt"
        fields = {
            "tokens": batch.tokens,
            "targets": batch.targets,
            "t_model": batch.t_model,
            "labels": batch.labels,
            "sizes": batch.latent_size,
        }
        torch.save(fields, given)
        found = self._kept("gradients", batch=str(given))
        return Gradients(found["losses"], found["by_name"])

    def step(self, phases: Phases) -> None:
        """See :class:`~.problem.TrainingRun`; returns when the work is done."""
        answer = self.process.ask({"do": "step", "timed": phases.timed})
        self.reported = Stepped(answer["loss"], answer["norm"])
        if phases.timed:
            phases.took(answer["seconds"], answer["whole"])

    def last(self) -> Stepped:
        """See :class:`~.problem.TrainingRun`."""
        return self.reported

    def probe(self) -> tuple[Tensor, Tensor]:
        """See :class:`~.problem.TrainingRun`."""
        found = self._kept("probe")
        return found["weight"], found["average"]

    def peak_bytes(self) -> int | None:
        """See :class:`~.problem.TrainingRun`."""
        found = self.process.ask({"do": "peak"})["bytes"]
        return None if found is None else int(found)

    def close(self) -> None:
        """See :class:`~.problem.TrainingRun`; the process serves the next problem."""
        if not self.process.ended:
            self.process.ask({"do": "release"})

    def _kept(self, do: str, **more: str) -> dict[str, Any]:
        """Send a request whose result the process writes to a file, and return that result."""
        file = Path(self.process.folder.name) / f"{do}.pt"
        self.process.ask({"do": do, "keep": str(file), **more})
        found: dict[str, Any] = torch.load(file, weights_only=True)
        file.unlink()
        return found

"""What ``bench training`` is tested on: a tiny problem on a CPU, its opponents and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.ceilings import Ceilings
from pixelflow_benchmarks.opponents.random_models import SHAPES, random_weights
from pixelflow_benchmarks.suites.training.checks import Expected, reference_gradients
from pixelflow_benchmarks.suites.training.opponents import TrainingOpponents
from pixelflow_benchmarks.suites.training.problem import Gradients, TrainingProblem
from pixelflow_training.collate import Batch

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e12, dtype=torch.float32)
TINY = TrainingProblem(config=SHAPES["tiny"], batch=4, dtype=torch.float32, device=CPU)
WEIGHTS = random_weights(TINY.config, CPU)


def opponents(weights: Mapping[str, Tensor] = WEIGHTS, public: Path | None = None) -> TrainingOpponents:
    return TrainingOpponents(TINY.config, weights, TINY.dtype, CPU, public)


def run(name: str, who: TrainingOpponents | None = None) -> Any:
    found = (who or opponents()).run(name, TINY)
    assert found is not None
    return found


def fixed_gradients() -> tuple[Batch, Gradients, Expected]:
    """The fixed batch; the reference's gradients there in float32, and what is expected."""
    batch = TINY.fixed_batch()
    plain, truth = (reference_gradients(TINY, WEIGHTS, batch, t) for t in (torch.float32, torch.float64))
    return batch, plain, Expected.of(plain, truth, torch.float32)

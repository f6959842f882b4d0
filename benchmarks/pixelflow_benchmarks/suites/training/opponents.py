"""Who trains: models of all variants, and who of them cannot be had."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.random_models import random_reference
from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.errors import BackendUnavailableError
from pixelflow_engine.model import PackedTransformer
from pixelflow_training.config import ComputeConfig, TrainConfig
from pixelflow_training.ranks import Ranks
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep, check_step

from .problem import REFERENCE, TrainingProblem, TrainingRun
from .public import PublicRun
from .runs import EngineRun, ReferenceRun

PLAIN = "engine, plain"
PUBLIC = "public"
ENGINES: dict[str, ComputeConfig] = {
    PLAIN: ComputeConfig(backend="torch"),
    "engine, triton": ComputeConfig(backend="triton"),
    "engine, compiled": ComputeConfig(backend="torch", compile=True),
    "engine, triton, compiled": ComputeConfig(backend="triton", compile=True),
    "engine, triton, graphs": ComputeConfig(backend="triton", graphs=True),
    "engine, flash": ComputeConfig(backend="flash"),
}
"""How steps are computed; where and in what type, the problem says."""
ON_CPU = (PLAIN, REFERENCE, "engine, compiled", PUBLIC)
ON_GPU = (
    "engine, triton",
    REFERENCE,
    PUBLIC,
    PLAIN,
    "engine, triton, graphs",
    "engine, triton, compiled",
    "engine, flash",
    "engine, compiled",
)
"""Most important first."""

BATCHES = {"xl": (4, 32), "cpu": (4,), "small": (6, 72), "tiny": (4,)}
"""By default: the published batch of a GPU and a large one; on small images few, where overhead shows, and many."""


class TrainingOpponents:
    """Makes runs; who cannot be had is told once.

    Args:
        config: of the model.
        weights: float32, of all models at first.
        dtype: of the matrix products.
        device: where.
        public: a checkout of the published code.
    """

    def __init__(
        self,
        config: PixelFlowConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        public: Path | None,
    ) -> None:
        self.config, self.weights, self.dtype, self.device, self.public = config, weights, dtype, device, public
        self.absent: dict[str, str] = {}
        # The reference's are everybody's: weights stay where they are in memory.
        self._reference = random_reference(config, weights, torch.float32).requires_grad_(True)
        self.parameters: dict[str, nn.Parameter] = dict(self._reference.named_parameters())
        self._steps: dict[str, TrainStep] = {}
        self._shared: TrainState | None = None
        self._process: PublicProcess | None = None

    def run(self, name: str, problem: TrainingProblem) -> TrainingRun | None:
        """The variant ready to train, or None where ``absent`` has the reason."""
        if name in self.absent:
            return None
        try:
            if name == REFERENCE:
                return ReferenceRun(problem, self._reference)
            if name == PUBLIC:
                return PublicRun(self._public(), problem)
            return EngineRun(problem, self._step(name, problem))
        except (BackendUnavailableError, ImportError, ValueError, RuntimeError, OSError) as error:
            self.absent[name] = first_line(error)
            return None

    @torch.no_grad()
    def reset(self) -> None:
        """The weights of this process as they were at first."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])

    def close(self) -> None:
        """End the published code's process."""
        if self._process is not None:
            self._process.close()

    def _step(self, name: str, problem: TrainingProblem) -> TrainStep:
        """A variant's step for batches of this size. What it has compiled and copied serves those of all sizes."""
        dtype: Literal["float32", "bfloat16"] = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        recipe = replace(problem.recipe, compute=replace(ENGINES[name], device=str(self.device), dtype=dtype))
        if name in self._steps:
            return self._steps[name].for_recipe(recipe)
        check_step(recipe, Ranks(0, 1, self.device))
        step = TrainStep(self._state(recipe), recipe)
        if step.graphs is None:  # which are of one size
            self._steps[name] = step
        return step

    def _state(self, recipe: TrainConfig) -> TrainState:
        """A state whose model is a variant's own; its tensors, the moments and the averages are everybody's."""
        with torch.device("meta"):
            model = PackedTransformer(self.config.model)
        model.load_state_dict(self.parameters, strict=True, assign=True)
        if self._shared is None:
            self._shared = TrainState(recipe, model)
        state = copy.copy(self._shared)
        state.model = model
        return state

    def _public(self) -> PublicProcess:
        if self.public is None:
            raise ValueError("public: no checkout of the published code was given")
        if self._process is not None and self._process.ended:  # for want of memory, in a larger batch
            self._process.close()
            self._process = None
        if self._process is None:
            self._process = PublicProcess(self.public, self.config, self.dtype, self.device, serve="train")
        return self._process

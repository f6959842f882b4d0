"""Variants of ``bench training``: their names, their models, and the reasons why some of them cannot run."""

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
"""How each variant computes its steps; device and type are those of the problem."""
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
"""Default batch sizes by shape. ``xl``: the published batch per GPU, and a large one. ``small``: few images, where
overhead shows, and many."""


class TrainingOpponents:
    """Makes the runs of all variants, which share one set of weights in this process.

    Args:
        config: configuration of the model.
        weights: initial float32 weights of all models.
        dtype: type of the matrix products.
        device: device to run on.
        public: a checkout of the published code.

    Attributes:
        absent: variants that cannot run, with the reason; they are not tried again.
        parameters: the shared parameters, by name.
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
        # All variants use the reference's parameters, so that there is one copy, at a fixed place in memory.
        self._reference = random_reference(config, weights, torch.float32).requires_grad_(True)
        self.parameters: dict[str, nn.Parameter] = dict(self._reference.named_parameters())
        self._steps: dict[str, TrainStep] = {}
        self._shared: TrainState | None = None
        self._process: PublicProcess | None = None

    def run(self, name: str, problem: TrainingProblem) -> TrainingRun | None:
        """Return the variant, ready to train, or None if it cannot run; ``absent`` then has the reason."""
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
        """Set the weights in this process to their initial values."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])

    def close(self) -> None:
        """End the published code's process."""
        if self._process is not None:
            self._process.close()

    def _step(self, name: str, problem: TrainingProblem) -> TrainStep:
        """Return a variant's step for batches of this size; its compiled code and copies of weights serve all sizes."""
        dtype: Literal["float32", "bfloat16"] = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        recipe = replace(problem.recipe, compute=replace(ENGINES[name], device=str(self.device), dtype=dtype))
        if name in self._steps:
            return self._steps[name].for_recipe(recipe)
        check_step(recipe, Ranks(0, 1, self.device))
        step = TrainStep(self._state(recipe), recipe)
        if step.graphs is None:  # graphs serve a single size
            self._steps[name] = step
        return step

    def _state(self, recipe: TrainConfig) -> TrainState:
        """Make a state whose model object is the variant's own; all states share weights, moments and averages."""
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
        if self._process is not None and self._process.ended:  # out of memory, at a larger batch size
            self._process.close()
            self._process = None
        if self._process is None:
            self._process = PublicProcess(self.public, self.config, self.dtype, self.device, serve="train")
        return self._process

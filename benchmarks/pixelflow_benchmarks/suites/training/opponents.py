"""Who trains: models of all variants, and who of them cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.random_models import random_reference
from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.backends import choose
from pixelflow_engine.compilation import compile_blocks
from pixelflow_engine.errors import BackendUnavailableError
from pixelflow_engine.model import PackedTransformer

from .problem import REFERENCE, TrainingProblem, TrainingRun
from .public import PublicRun
from .runs import EngineRun, EngineState, ReferenceRun

PLAIN = "engine, plain"
PUBLIC = "public"
ENGINES: dict[str, tuple[str, bool]] = {
    PLAIN: ("torch", False),
    "engine, triton": ("triton", False),
    "engine, compiled": ("torch", True),
    "engine, triton, compiled": ("triton", True),
    "engine, flash": ("flash", False),
}
"""Backend, compiled."""
ON_CPU = (PLAIN, REFERENCE, "engine, compiled", PUBLIC)
ON_GPU = (
    "engine, triton",
    REFERENCE,
    PUBLIC,
    PLAIN,
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
        self._engines: dict[str, PackedTransformer] = {}
        self._state: EngineState | None = None
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
            model = self._engine(name)
            if self._state is None:
                self._state = EngineState.of(problem.recipe, model)
            return EngineRun(problem, model, self._state)
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

    def _engine(self, name: str) -> PackedTransformer:
        if name not in self._engines:
            backend, compiled = ENGINES[name]
            found = choose(backend, self.device, self.dtype, self.config.model.attention_head_dim)
            with torch.device("meta"):
                model = PackedTransformer(self.config.model, found.operations(compiled, known_packs=True))
            model.load_state_dict(self.parameters, strict=True, assign=True)
            if compiled:
                compile_blocks(model)
            self._engines[name] = model
        return self._engines[name]

    def _public(self) -> PublicProcess:
        if self.public is None:
            raise ValueError("public: no checkout of the published code was given")
        if self._process is not None and self._process.ended:  # for want of memory, in a larger batch
            self._process.close()
            self._process = None
        if self._process is None:
            self._process = PublicProcess(self.public, self.config, self.dtype, self.device, serve="train")
        return self._process

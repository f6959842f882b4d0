"""Variants of ``bench stages``: their names, their models, and the reasons why some of them cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelflow_benchmarks.harness.timing import first_line
from pixelflow_benchmarks.opponents.public_process import PublicProcess
from pixelflow_benchmarks.opponents.random_models import compile_blocks, random_engine
from pixelflow_engine import PixelFlowConfig, PixelFlowEngine
from pixelflow_engine.errors import BackendUnavailableError

from .problem import REFERENCE, StageProblem, StageRun
from .runs import EngineRun, PublicRun, ReferenceRun, TorchdiffeqRun, reference_model

COMPILED_REFERENCE = "reference/compiled"
TORCHDIFFEQ = "torchdiffeq"
PUBLIC = "public"
HOW = {
    "eager": {"compile": False, "graphs": False},
    "compiled": {"compile": True, "graphs": False},
    "graphs": {"compile": False, "graphs": True},
    "both": {"compile": True, "graphs": True},
}
ENGINES = tuple(f"{backend}/{how}" for backend in ("triton", "flash", "torch") for how in HOW)
VARIANTS = (REFERENCE, COMPILED_REFERENCE, TORCHDIFFEQ, PUBLIC, *ENGINES)
SOLVER_OF = {TORCHDIFFEQ: "dopri5"}
"""Solver of the variants that have only one."""
FIRST = (
    REFERENCE,
    PUBLIC,
    TORCHDIFFEQ,
    "triton/graphs",
    "triton/eager",
    "triton/both",
    "flash/graphs",
    "torch/eager",
    "torch/both",
)
"""Variants that are measured before the others, the most important first."""


@dataclass(eq=False)
class Opponents:
    """Models of all variants, each made when it is first needed.

    Attributes:
        config: configuration of the model.
        weights: weights of all models, exact in ``dtype``.
        dtype: type of the matrix products.
        public: a checkout of the published code, or None.
        absent: variants that cannot run, with the reason; they are not tried again.
    """

    config: PixelFlowConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    public: Path | None
    absent: dict[str, str] = field(default_factory=dict)
    _made: dict[str, Any] = field(default_factory=dict)

    def runs(self, name: str, problem: StageProblem) -> StageRun | None:
        """Return the variant, ready to run, or None if it cannot run; ``absent`` then has the reason."""
        if name in self.absent:
            return None
        made = self._made.get(name)
        if isinstance(made, PublicProcess) and made.ended:  # what it could not do may be no trouble now
            made.close()
            del self._made[name]
        if name not in self._made:
            try:
                self._made[name] = self._make(name, problem)
            except (BackendUnavailableError, ImportError, ValueError, RuntimeError, OSError) as error:
                self.absent[name] = first_line(error)
                return None
        return self._run(name, problem)

    def _make(self, name: str, problem: StageProblem) -> Any:
        if name == REFERENCE:
            return reference_model(problem, self.weights)
        if name == COMPILED_REFERENCE:
            model = reference_model(problem, self.weights)
            compile_blocks(model)
            return model
        if name == TORCHDIFFEQ:
            import torchdiffeq  # noqa: F401

            self.runs(REFERENCE, problem)
            return self._made[REFERENCE]
        if name == PUBLIC:
            if self.public is None:
                raise ValueError("public: no checkout of the published code was given")
            return PublicProcess(self.public, problem.config, problem.dtype, problem.device)
        backend, _, how = name.partition("/")
        return random_engine(self.config, self.weights, self.dtype, backend, **HOW[how])

    def _run(self, name: str, problem: StageProblem) -> StageRun:
        made = self._made[name]
        if isinstance(made, PixelFlowEngine):
            return EngineRun(made, problem)
        if isinstance(made, PublicProcess):
            return PublicRun(made, problem)
        return TorchdiffeqRun(made, problem) if name == TORCHDIFFEQ else ReferenceRun(made, problem)

    def size(self, name: str) -> int:
        """Return the bytes of a variant's weights, allocated before it runs; 0 for the published code's process."""
        made = self._made[name]
        module = made.model if isinstance(made, PixelFlowEngine) else made
        if not isinstance(module, torch.nn.Module):
            return 0
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.parameters()}
        kept |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in module.buffers()}
        return sum(kept.values())

    def close(self) -> None:
        """End the published code's process."""
        for made in self._made.values():
            if isinstance(made, PublicProcess):
                made.close()

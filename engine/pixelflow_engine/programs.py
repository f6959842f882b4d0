"""Steps of a stage as fixed lists of launches over static tensors, captured as CUDA graphs or launched directly.

A program is built for a pack and its solver, then loaded with the values of a call. No launch waits for the device or
depends on values that the device computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pixelflow_kernels import ode_step
from pixelflow_kernels.ode_step import Adaptive
from pixelflow_kernels.transfers import numbers

from .graphs import Capture, Launch, load_
from .layers import at_least_fp32
from .model import Prompts, Surroundings
from .plan import Condition
from .ranges import named
from .schedule import Stage
from .solvers import Tolerance
from .stage_pack import StagePack
from .tableaus import DOPRI5, FIXED_STEPS, Tableau


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """The guided or the unguided images of a state.

    Attributes:
        tokens: their tokens in the state.
        velocities: their tokens in the velocities of the pack, null half first.
        guidance: guidance weights; None for the unguided images.
        slopes: ``[S, t, W]``, the slopes of a step.
    """

    tokens: slice
    velocities: slice
    guidance: Tensor | None
    slopes: Tensor


class Program:
    """Static tensors and the launches over them.

    Args:
        pack: the pack whose state is advanced.
        prompts: for a model with cross-attention, in tensors whose addresses stay fixed.
        capture: captures the launches as graphs; None runs them directly.
    """

    def __init__(self, pack: StagePack, prompts: Prompts | None, capture: Capture | None) -> None:
        device, model = pack.model.device, pack.model
        high = at_least_fp32(model.dtype)
        self.pack = pack
        self.capture = capture
        self.around: Surroundings = model.surroundings(pack.layout, prompts)
        self.x = torch.zeros(pack.tokens, pack.width, dtype=high, device=device)
        self.guidance = pack.guidance()
        self._ready: dict[str, Launch] = {}

    def launches(self) -> Mapping[str, Launch]:
        """All launches by name."""
        raise NotImplementedError

    def play(self, name: str) -> None:
        """Run a launch, or replay its graph, which :meth:`prepare` captured."""
        (self.launches()[name] if self.capture is None else self._ready[name])()

    def prepare(self, *names: str) -> None:
        """Capture these launches unless already captured; without capture, do nothing. Changes the static tensors."""
        for name in names:
            if self.capture is not None and name not in self._ready:
                with named("capture", name):
                    self._ready[name] = self.capture.capture(self.launches()[name])

    def load(self, pack: StagePack, x: Tensor) -> None:
        """Load the guidance weights and the state of a call whose pack has the same layout as this program's."""
        self.load_state(x)
        guidance = pack.guidance()
        if self.guidance is not None and guidance is not None:
            load_(self.guidance, guidance, "guidance")

    def load_state(self, x: Tensor) -> None:
        """Load the state alone, in any floating-point dtype."""
        load_(self.x, x.to(self.x.dtype), "x")


class FixedSteps(Program):
    """Steps of every method in :data:`pixelflow_engine.tableaus.FIXED_STEPS`.

    Modulations and step lengths are loaded before each step. ``previous`` holds the first velocities of the last step,
    in the model's dtype, for two-step methods; Euler steps do not write it.
    """

    def __init__(self, pack: StagePack, prompts: Prompts | None, capture: Capture | None) -> None:
        super().__init__(pack, prompts, capture)
        device, model = pack.model.device, pack.model
        images = pack.layout.num_images
        columns = (6 * model.config.depth + 2) * model.config.width
        tableaus = [method for method in FIXED_STEPS.values() if isinstance(method, Tableau)]
        self.slopes = max(len(tableau.nodes) for tableau in tableaus)
        self.rows = torch.zeros(self.slopes, images, columns, dtype=self.x.dtype, device=device)
        self.steps = torch.zeros(2, dtype=torch.float64, device=device)
        self.probe = torch.zeros_like(self.x)
        self.previous = torch.zeros(pack.layout.num_tokens, pack.width, dtype=model.dtype, device=device)
        self.parts = self._parts()

    def _parts(self) -> list[Part]:
        guided, total = self.pack.guided_tokens, self.pack.tokens
        spans = [(slice(0, guided), slice(0, 2 * guided), self.guidance)] if guided else []
        if guided < total:
            spans.append((slice(guided, total), slice(2 * guided, guided + total), None))
        return [
            Part(tokens, velocities, guidance, self.x.new_zeros(self.slopes, *self.x[tokens].shape))
            for tokens, velocities, guidance in spans
        ]

    def launches(self) -> Mapping[str, Launch]:
        """See :class:`Program`."""
        return {
            name: partial(self._runge_kutta, method) if isinstance(method, Tableau) else self._two_step
            for name, method in FIXED_STEPS.items()
        }

    def load_step(self, *rows: Tensor, steps: Tensor) -> None:
        """Load what the next step reads.

        Args:
            rows: modulations ``[n, (6 depth + 2) C]`` of each slope, in the model's dtype.
            steps: ``[2]``, factors of the slopes.

        All of it must already be on the device: a copy from the host would wait for the previous step.
        """
        for buffer, value in zip(self.rows, rows, strict=False):
            load_(buffer, value, "modulations", self.pack.model.dtype)
        load_(self.steps, steps, "steps")

    def _velocity(self, x: Tensor, slope: int) -> Tensor:
        modulations = self.pack.model.split_modulations(self.rows[slope])
        return self.pack.velocity(x, modulations, self.around)

    def _update(self, velocity: Tensor, step: Tensor) -> None:
        for part in self.parts:
            ode_step.euler_step_(self.x[part.tokens], velocity[part.velocities], step, part.guidance)

    def _runge_kutta(self, tableau: Tableau) -> None:
        first = self._velocity(self.x, 0)
        if len(tableau.nodes) == 1:  # no slopes to store: guidance and update in one pass
            self._update(first, self.steps[:1])
            return
        self._stage(first, tableau.coupling[1])
        for slope, row in enumerate(tableau.coupling[2:], 1):
            self._stage(self._velocity(self.probe, slope), row)
        self.x.copy_(self.probe)
        self.previous.copy_(first)

    def _stage(self, velocity: Tensor, weights: tuple[float, ...]) -> None:
        for part in self.parts:
            probe, x = self.probe[part.tokens], self.x[part.tokens]
            new = velocity[part.velocities]
            ode_step.stage_state_(probe, part.slopes, x, self.steps[:1], weights, new, part.guidance)

    def _two_step(self) -> None:
        velocity = self._velocity(self.x, 0)
        self._update(velocity, self.steps[:1])
        self._update(self.previous, self.steps[1:])
        self.previous.copy_(velocity)


class AdaptiveSteps(Program):
    """Attempts of Dopri5, with step control on the device. Either all images are guided or none, and all have one size.

    Args:
        pack, prompts, capture: as in :class:`Program`.
        stage: the stage, for its window of model times.
        labels: class labels of the pack; this tensor becomes static.
        tolerance: error control; ``error_norm`` and ``max_attempts`` are fixed, the rest is loaded for each call.
    """

    def __init__(
        self,
        pack: StagePack,
        prompts: Prompts | None,
        capture: Capture | None,
        stage: Stage,
        labels: Tensor | None,
        tolerance: Tolerance,
    ) -> None:
        super().__init__(pack, prompts, capture)
        self.stage = stage
        self.labels = labels
        self.images = len(pack.sizes)
        self.batch_wide = tolerance.error_norm == "batch"
        self.max_attempts = tolerance.max_attempts
        self.state = Adaptive.around(self.x, self.images, len(DOPRI5.nodes))

    def launches(self) -> Mapping[str, Launch]:
        """See :class:`Program`."""
        told = (self.state, DOPRI5, self._field, self.guidance)
        return {
            "start": partial(ode_step.start_, *told, batch_wide=self.batch_wide),
            "attempt": partial(ode_step.attempt_, *told, max_attempts=self.max_attempts, batch_wide=self.batch_wide),
        }

    def load_call(self, labels: Tensor | None, tolerance: Tolerance) -> None:
        """Load the class labels and the tolerance of a call."""
        if self.labels is not None and labels is not None:
            load_(self.labels, labels, "class_labels")
        given = numbers([tolerance.rtol, tolerance.atol], torch.float64, self.state.tolerance.device)
        load_(self.state.tolerance, given, "rtol, atol")

    def _field(self, x: Tensor, tau: Tensor) -> Tensor:
        """Velocities of the pack, with a local time per image, ``tau [B]`` float64."""
        first, last = self.stage.window
        times = (first + (last - first) * tau).to(torch.float32)
        if self.pack.plan.guided:
            times = torch.cat([times, times])
        with named("modulations"):
            c = self.pack.model.conditioning(times, self.pack.latent_size, self.labels)
            modulations = self.pack.model.modulations(c)
        return self.pack.velocity(x, modulations, self.around)


def program_key(pack: StagePack, prompts: Prompts | None, kind: str, *more: object) -> tuple[object, ...]:
    """Cache key: programs with equal keys are interchangeable."""
    text = None if prompts is None else prompts.kind()
    per_image = pack.plan.guided > 0 and len({*pack.plan.weights[: pack.plan.guided]}) > 1
    return kind, pack.plan.stage.index, pack.plan.shapes, pack.plan.guided, per_image, text, *more


def labels_of(pack: StagePack, condition: Condition) -> Tensor | None:
    """Class labels of the pack in a new tensor; None without class labels."""
    labels = pack.labels(condition)
    return None if labels is None else labels.clone()

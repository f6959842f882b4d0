"""Whole training steps as CUDA graphs, one for each shape that a step of a recipe may have.

Of ``S`` stages and batches of ``B`` images there are ``S / gcd(B, S)`` shapes (see :mod:`.plan`). A graph holds forward
and backward pass, norm, clipping, AdamW and average; whether the step counts is decided inside. Beside it only copies
into its static inputs, its learning rate and its count are launched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pixelflow_engine.errors import CaptureError, ConfigError
from pixelflow_engine.graphs import Capture, CudaCapture, Launch, load_
from pixelflow_engine.model import PackedTransformer, Surroundings
from pixelflow_engine.ranges import named

from .collate import Batch
from .config import TrainConfig
from .plan import parts_of_step, token_sides
from .ranks import Ranks
from .update import FusedUpdate, Update

Shape = tuple[tuple[tuple[int, int], ...], ...]
"""Rows and columns of tokens of each image of each part."""

Steps = Callable[[Sequence[Batch], Sequence[Batch], Sequence[Surroundings | None]], tuple[Tensor, Tensor]]
"""Launches a step of some parts; gives its losses and its norm."""

LOADED = ("tokens", "targets", "t_model", "labels", "latent_size")
"""What of a pack differs from step to step."""


def shapes_of_steps(config: TrainConfig) -> list[Shape]:
    """Every shape that a step of one process may have: steps take them in turn."""
    count, num_stages = config.batch_size, config.scheduler.num_stages
    shapes = []
    for step in range(num_stages // math.gcd(count, num_stages)):
        sides = token_sides(config, step * count, count)
        parts = parts_of_step(config, step)
        shapes.append(tuple(tuple((side, side) for side in sides[part::parts]) for part in range(parts)))
    return shapes


def refuse_graphs(backend: str, ranks: Ranks, device: torch.device) -> None:
    """Say why there can be no graphs of steps, where that is so.

    Raises:
        ConfigError: naming the reason.
    """
    reason = None
    if device.type != "cuda":
        reason = f"a {device.type} has none"
    elif not ranks.alone:
        reason = f"{ranks.world_size} ranks exchange gradients in the middle of a step"
    elif backend == "torch":
        reason = "with backend=torch the host decides in the middle of a step whether it counts"
    if reason is not None:
        raise ConfigError(f"compute.graphs: got true, expected false: {reason}")


def graphs_of(config: TrainConfig, ranks: Ranks, device: torch.device, update: Update) -> Capture:
    """CUDA's capture, or :func:`refuse_graphs`."""
    refuse_graphs("triton" if isinstance(update, FusedUpdate) else "torch", ranks, device)
    return CudaCapture(device)


class StaticStep:
    """A step over tensors that stay where they are.

    Args:
        model: who computes.
        like: parts of the same shapes.

    Attributes:
        parts: static; :meth:`load` fills them.
        around: what the blocks share in each.
        losses: ``[n]`` of the last replay.
        norm: 0-d, of the last replay.
    """

    def __init__(self, model: PackedTransformer, like: Sequence[Batch]) -> None:
        self.parts = [part.clone() for part in like]
        with torch.no_grad():
            self.around = [model.surroundings(part.layout, None) for part in self.parts]
        images = sum(part.layout.num_images for part in like)
        self.losses, self.norm = (torch.zeros(shape, device=model.device) for shape in ((images,), ()))
        self.replay: Launch | None = None

    def load(self, parts: Sequence[Batch]) -> None:
        """Copy a step's parts into the static ones.

        Raises:
            ValueError: a tensor has another shape, type or device than when it was captured; the message names it.
        """
        for static, given in zip(self.parts, parts, strict=True):
            for name in LOADED:
                buffer, value = getattr(static, name), getattr(given, name)
                if (buffer is None) != (value is None):
                    there = "none" if buffer is None else "some"
                    raise ValueError(f"{name}: got {'none' if value is None else 'some'}, expected {there} as captured")
                if buffer is None:
                    continue
                load_(buffer, value, name)


class StepGraphs:
    """Replays steps, each shape captured when it comes first.

    Args:
        model: who computes.
        steps: launches a step: :meth:`.step.TrainStep.launch`.
        update: of the weights; a fused one.
        capture: makes graphs.
        config: the recipe, which says what shapes there are.

    Raises:
        ConfigError: the update is PyTorch's, for which the host decides whether a step counts.
    """

    def __init__(
        self, model: PackedTransformer, steps: Steps, update: Update, capture: Capture, config: TrainConfig
    ) -> None:
        if not isinstance(update, FusedUpdate):
            raise ConfigError("compute.graphs: got true, expected false: the host decides whether a step counts")
        self.model, self.update, self.capture = model, update, capture
        self.expected = set(shapes_of_steps(config))
        self.static: dict[Shape, StaticStep] = {}
        self._steps = steps
        self._gradients: list[Tensor] = []
        # In one part gradients are taken where they were computed, see TrainStep.launch.
        self._source = model if config.compute.max_tokens is None else update.state.model

    def __call__(self, parts: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            parts: on the device.
            lr: the learning rate.

        Returns:
            losses of the images, part after part, ``[n]``, and the norm, in memory that the next step of this shape
            writes to.

        Raises:
            CaptureError: it could not be captured; nothing has changed.
            ValueError: no step of the recipe has such parts; or a tensor has another type or device than before.
        """
        shape = tuple(part.layout.grids for part in parts)
        if shape not in self.expected:
            raise ValueError(
                f"batch: got parts of {[len(grids) for grids in shape]} images whose grids are those of no step of the "
                f"recipe, expected one of its {len(self.expected)} shapes"
            )
        static = self.static.get(shape)
        if static is None:
            static = self._capture(shape, parts)
        self.update.prepare(lr)
        static.load(parts)
        assert static.replay is not None
        with named("replay"):
            static.replay()
        return static.losses, static.norm

    def close(self) -> None:
        """Release all graphs and their memory; the next step captures again."""
        self.capture.close()
        self.static.clear()
        self._gradients.clear()

    def _capture(self, shape: Shape, parts: Sequence[Batch]) -> StaticStep:
        static = StaticStep(self.model, parts)

        def launch() -> None:
            losses, norm = self._steps(static.parts, (), static.around)
            static.losses.copy_(losses)
            static.norm.copy_(norm)

        try:
            # Warming up runs steps: they must not move a weight.
            with self.update.shut(), named("capture"):
                self._lend_gradients()
                static.replay = self.capture.capture(launch)
        except CaptureError as error:
            raise CaptureError(f"{error}; the same command goes on with compute.graphs=false") from error
        finally:
            self._take_gradients()
        self.static[shape] = static
        return static

    def _lend_gradients(self) -> None:
        """Have a backward pass add to memory that all graphs write to: between steps it is zeros."""
        parameters = list(self._source.parameters())
        if not self._gradients:
            self._gradients = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _take_gradients(self) -> None:
        """Leave nothing with the models: what is launched without graphs has gradients of its own."""
        for gradient in self._gradients:
            gradient.zero_()
        for model in (self._source, self.model):
            model.zero_grad(set_to_none=True)

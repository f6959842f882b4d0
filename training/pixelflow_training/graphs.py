"""Whole training steps as CUDA graphs, one for each shape that a step of a recipe may have.

With ``S`` stages and batches of ``B`` images there are ``S / gcd(B, S)`` shapes (see :mod:`.plan`). A graph contains
the forward and backward pass, norm, clipping, AdamW and the moving average; whether the step counts is decided on the
device. Besides a replay, only the copies into its static inputs, the learning rate and the step count are launched.
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
"""Token grid (rows, columns) of each image of each part."""

Steps = Callable[[Sequence[Batch], Sequence[Batch], Sequence[Surroundings | None]], tuple[Tensor, Tensor]]
"""Launches a step, given parts, idle parts and surroundings; returns its losses and gradient norm."""

LOADED = ("tokens", "targets", "t_model", "labels", "latent_size")
"""The fields of a pack that differ from step to step."""


def shapes_of_steps(config: TrainConfig) -> list[Shape]:
    """Return every shape that a step of a single process may have; consecutive steps cycle through them."""
    count, num_stages = config.batch_size, config.scheduler.num_stages
    shapes = []
    for step in range(num_stages // math.gcd(count, num_stages)):
        sides = token_sides(config, step * count, count)
        parts = parts_of_step(config, step)
        shapes.append(tuple(tuple((side, side) for side in sides[part::parts]) for part in range(parts)))
    return shapes


def refuse_graphs(backend: str, ranks: Ranks, device: torch.device) -> None:
    """Refuse ``compute.graphs`` where steps cannot be captured.

    Raises:
        ConfigError: graphs are not possible; the message gives the reason.
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
    """Return the capture for a CUDA device.

    Raises:
        ConfigError: see :func:`refuse_graphs`.
    """
    refuse_graphs("triton" if isinstance(update, FusedUpdate) else "torch", ranks, device)
    return CudaCapture(device)


class StaticStep:
    """The tensors that one captured step reads and writes, at fixed addresses.

    Args:
        model: the model that computes velocities.
        like: parts of the shape to capture.

    Attributes:
        parts: static inputs, filled by :meth:`load`.
        around: what the model's blocks share, for each part.
        losses: ``[n]`` losses of the last replay.
        norm: 0-d gradient norm of the last replay.
        replay: launches the captured step; None before the capture.
    """

    def __init__(self, model: PackedTransformer, like: Sequence[Batch]) -> None:
        self.parts = [part.clone() for part in like]
        with torch.no_grad():
            self.around = [model.surroundings(part.layout, None) for part in self.parts]
        images = sum(part.layout.num_images for part in like)
        self.losses, self.norm = (torch.zeros(shape, device=model.device) for shape in ((images,), ()))
        self.replay: Launch | None = None

    def load(self, parts: Sequence[Batch]) -> None:
        """Copy the parts of a step into the static ones.

        Raises:
            ValueError: a tensor's shape, type or device differs from that at capture; the message names it.
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
    """Replays training steps; each shape is captured on its first occurrence.

    Args:
        model: the model that computes velocities.
        steps: launches a step: :meth:`.step.TrainStep.launch`.
        update: update of the weights; a :class:`.update.FusedUpdate`.
        capture: makes graphs.
        config: the recipe, which determines the possible shapes.

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
        # A step in one part uses gradients where they were computed, see TrainStep.launch.
        self._source = model if config.compute.max_tokens is None else update.state.model

    def __call__(self, parts: Sequence[Batch], lr: float) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            parts: the packs of the step, on the device.
            lr: the learning rate.

        Returns:
            losses of the images, part after part, ``[n]``, and the gradient norm, 0-d. Both are in memory that the next
            step of this shape overwrites.

        Raises:
            CaptureError: the step could not be captured; nothing has changed.
            ValueError: no step of the recipe has such parts, or a tensor's type or device differs from that at capture.
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
        """Release all graphs and their memory; the next step is captured again."""
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
            # The warm-up runs real steps, which must not change any weight.
            with self.update.shut(), named("capture"):
                self._lend_gradients()
                static.replay = self.capture.capture(launch)
        except CaptureError as error:
            raise CaptureError(f"{error}; the same command continues with compute.graphs=false") from error
        finally:
            self._take_gradients()
        self.static[shape] = static
        return static

    def _lend_gradients(self) -> None:
        """Set ``grad`` to buffers that all graphs share; they are zero between steps."""
        parameters = list(self._source.parameters())
        if not self._gradients:
            self._gradients = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _take_gradients(self) -> None:
        """Zero the shared buffers and clear ``grad`` of the models: steps without graphs allocate their own."""
        for gradient in self._gradients:
            gradient.zero_()
        for model in (self._source, self.model):
            model.zero_grad(set_to_none=True)

"""The public face: load a model, sample images, ask for velocities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixelflow_kernels import PackedLayout

from . import arguments, backends
from .checkpoint import Checkpoint, load_checkpoint
from .config import PixelFlowConfig
from .layers import patchify, unpatchify
from .model import PackedTransformer
from .noise import CounterNoise, NoiseSource, PublicNoise
from .operations import Text
from .sampler import (
    Callbacks,
    Condition,
    SamplingPlan,
    StageEvent,
    StageReport,
    StepEvent,
    plan_stages,
    sample,
)
from .solvers import Tolerance

Images = list[Image.Image] | NDArray[np.float32] | Tensor


@dataclass(frozen=True, eq=False, slots=True)
class SamplingOutput:
    """What a call made.

    Attributes:
        images: ``pil``: a list of images; ``np``: ``[B, H, W, c]`` float32 in [0, 1]; ``pt``: ``[B, c, H, W]`` float32
            in [0, 1] on the engine's device.
        stages: a report per stage, smallest first.
        seeds: the seed of each image, whose noise it draws again, bit for bit, in any batch (``noise="counter"``); the
            stream's one seed, or nothing for torch's global generator (``noise="public"``).
    """

    images: Images
    stages: tuple[StageReport, ...]
    seeds: tuple[int, ...]


class PixelFlowEngine:
    """A PixelFlow model that samples.

    Args:
        config: the model's configuration.
        model: its transformer, already of the wanted type and on the wanted device.
        backend: ``auto``, ``torch``, ``triton`` or ``flash``.

    Raises:
        BackendUnavailableError: the named backend cannot run here.
    """

    def __init__(self, config: PixelFlowConfig, model: PackedTransformer, backend: str = "auto") -> None:
        self.backend = backends.choose(backend)
        self.config = config
        self.model = model.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        weights: Literal["auto", "ema", "model"] = "auto",
    ) -> PixelFlowEngine:
        """Load a checkpoint.

        Args:
            path_or_name: a folder ``config.json`` + ``model.safetensors``, a published folder ``config.yaml`` +
                ``model.pt``, a training checkpoint beside its ``config.yaml``, or the name of a bundled model
                (``digits``).
            device: where to run.
            dtype: type of weights and matrix products: float32, bfloat16, float16 or float64.
            backend: see :mod:`pixelflow_engine.backends`.
            weights: which weights of a training checkpoint; ``auto`` takes the averaged ones where there are any.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or not what it should be.
            BackendUnavailableError: the named backend cannot run here.
            ValueError: the device is not there, or the type is another.
        """
        backends.choose(backend)
        device = arguments.place(device)
        return cls.from_checkpoint(load_checkpoint(path_or_name, weights), device, dtype, backend)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> PixelFlowEngine:
        """The same from a checkpoint in memory, whose tensors are copied only where type or device differ."""
        device = arguments.place(device)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype: got {dtype}, expected float32, bfloat16, float16 or float64")
        with torch.device("meta"):
            model = PackedTransformer(checkpoint.config.model)
        state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in checkpoint.state_dict.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return cls(checkpoint.config, model, backend)

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and matrix products."""
        return self.model.dtype

    def __call__(
        self,
        class_labels: Sequence[int] | int | Tensor | None = None,
        *,
        num_inference_steps: int | Sequence[int] = 10,
        guidance_scale: float = 2.4,
        guidance_schedule: Literal["stagewise", "constant"] | Sequence[float] = "stagewise",
        solver: Literal["euler", "dopri5"] = "euler",
        shift: float = 1.0,
        seed: int | Sequence[int] | None = 0,
        noise: Literal["counter", "public"] = "counter",
        state: Literal["fp32", "public"] = "fp32",
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
        callback_on_step_end: Callable[[StepEvent], None] | None = None,
        callback_on_stage_end: Callable[[StageEvent], None] | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        error_norm: Literal["image", "batch"] = "image",
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        null_encoder_hidden_states: Tensor | None = None,
        null_encoder_attention_mask: Tensor | None = None,
    ) -> SamplingOutput:
        """Sample a batch of images.

        Args:
            class_labels: one per image, 0 to ``num_classes``, the last being the null class; None for a text model.
            num_inference_steps: Euler steps, for all stages or for each; Dopri5 chooses its own.
            guidance_scale: largest guidance weight; 1 is no guidance. A list in ``guidance_schedule`` takes its place.
            guidance_schedule: ``stagewise`` grows from 1 at the first stage to ``guidance_scale`` at the last,
                ``constant`` uses it throughout; or a weight for each stage.
            solver: ``euler`` or ``dopri5``.
            shift: time shift of Euler's steps; Dopri5 has none.
            seed: ``noise="counter"``: one per image, or the first image's, from which the others count up, or None for
                fresh ones. ``noise="public"``: of the one stream, or None for torch's global generator.
            noise: ``counter``: an image's noise depends on its own seed alone. ``public``: the published code's CPU
                random stream.
            state: ``fp32``, or ``public`` for the published code's state in the velocity's type.
            height, width: in pixels; the model's resolution by default.
            output_type: see :class:`SamplingOutput`.
            callback_on_step_end, callback_on_stage_end: called as the names say.
            rtol, atol, error_norm: of Dopri5, without effect on Euler; see :class:`pixelflow_engine.solvers.Tolerance`.
            encoder_hidden_states: encoded prompts ``[B, L, E]``, for a text model.
            encoder_attention_mask: ``[B, L]``, 1 for tokens and 0 for padding.
            null_encoder_hidden_states, null_encoder_attention_mask: the encoded empty prompt, ``[B, L, E]`` or ``[1,
                L, E]``; needed where a weight is not 1.

        Raises:
            ValueError: naming the argument, what came and what was expected.
            FloatingPointError: an image is not finite at the end of a stage.
            ConvergenceError: Dopri5 could not meet its tolerance.

        Source: arXiv 2504.07963, section 3.4.
        """
        num_stages = self.config.scheduler.num_stages
        steps = arguments.steps(num_inference_steps, num_stages)
        weights = arguments.guidance_weights(guidance_scale, guidance_schedule, num_stages)
        arguments.choice("solver", solver, ("euler", "dopri5"))
        arguments.choice("state", state, ("fp32", "public"))
        arguments.choice("output_type", output_type, ("pil", "np", "pt"))
        if output_type == "pil" and self.config.model.out_channels not in (1, 3):
            raise ValueError(
                f"output_type: got 'pil', expected 'np' or 'pt' for images of {self.config.model.out_channels} channels"
            )
        tolerance = Tolerance(
            rtol=arguments.positive_number("rtol", rtol),
            atol=arguments.positive_number("atol", atol),
            error_norm="image"
            if arguments.choice("error_norm", error_norm, ("image", "batch")) == "image"
            else "batch",
        )
        pixel_height = arguments.image_size("height", height, self.config)
        pixel_width = arguments.image_size("width", width, self.config)
        shift = arguments.positive_number("shift", shift)
        if solver == "dopri5" and (state != "fp32" or shift != 1.0):
            raise ValueError(f"solver: got 'dopri5' with state={state!r} and shift={shift}, which are Euler's alone")
        condition, batch = self._condition(
            class_labels,
            (encoder_hidden_states, encoder_attention_mask),
            (null_encoder_hidden_states, null_encoder_attention_mask),
            weights,
            seed,
        )
        source, seeds = self._noise(noise, seed, batch)

        plan = SamplingPlan(
            stages=plan_stages(self.config, batch, pixel_height, pixel_width, weights, steps),
            solver=solver,
            shift=shift,
            state=state,
            tolerance=tolerance,
        )
        callbacks = Callbacks(callback_on_step_end, callback_on_stage_end)
        x, reports = sample(self.model, self.config, plan, condition, source, callbacks)
        return SamplingOutput(to_output(x, output_type), tuple(reports), seeds)

    def velocity(
        self,
        x: Tensor,
        t_model: Tensor | float,
        *,
        class_labels: Sequence[int] | int | Tensor | None = None,
        latent_size: Tensor | int | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The model's velocity, without guidance, for samplers of your own; differentiable with respect to ``x``.

        Args:
            x: images ``[B, c, h, w]``, h and w multiples of the patch size.
            t_model: time on the 0..999 axis, one or one per image.
            class_labels: one per image, the null class being ``num_classes``.
            latent_size: width in tokens, one or one per image; ``x``'s own by default.
            encoder_hidden_states, encoder_attention_mask: encoded prompts ``[B, L, E]`` and mask ``[B, L]``.

        Returns:
            ``[B, c, h, w]`` in the type of ``x``.

        Raises:
            ValueError: naming the argument, what came and what was expected.
        """
        model, config = self.model, self.config.model
        x = arguments.images(x, config)
        batch, _, height, width = x.shape
        p = config.patch_size
        labels, text = None, None
        if config.num_classes > 0:
            labels = arguments.labels(class_labels, config, self.device)
            _same_batch("class_labels", len(labels), batch)
        elif class_labels is not None:
            arguments.labels(class_labels, config, self.device)
        if config.cross_attention_dim is None:
            arguments.no_text(
                config, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask
            )
        else:
            text = arguments.text("", encoder_hidden_states, encoder_attention_mask, config, self.device, self.dtype)
            _same_batch("encoder_hidden_states", len(text.states), batch)
        size = width // p if latent_size is None else latent_size
        tokens = model(
            patchify(x.to(self.device), p),
            arguments.per_image("t_model", t_model, batch, self.device, torch.float32),
            PackedLayout.from_grids([(height // p, width // p)] * batch, self.device),
            arguments.per_image("latent_size", size, batch, self.device, torch.int64),
            labels,
            text,
        )
        return unpatchify(tokens, (batch, config.out_channels, height, width), p).to(x.dtype)

    def _condition(
        self,
        class_labels: object,
        text: tuple[Tensor | None, Tensor | None],
        null_text: tuple[Tensor | None, Tensor | None],
        weights: tuple[float, ...],
        seed: object,
    ) -> tuple[Condition, int]:
        """What to show, and how many images."""
        config = self.config.model
        guided = any(weight != 1 for weight in weights)
        if config.cross_attention_dim is not None:
            if class_labels is not None and config.num_classes == 0:
                arguments.labels(class_labels, config, self.device)
            prompt = arguments.text("", *text, config, self.device, self.dtype)
            batch = len(prompt.states)
            labels = None
            if config.num_classes > 0:
                labels = arguments.labels(class_labels, config, self.device)
                _same_batch("class_labels", len(labels), batch)
            null = None
            if guided:
                null = arguments.text("null_", *null_text, config, self.device, self.dtype)
                if len(null.states) == 1:
                    mask = None if null.mask is None else null.mask.expand(batch, -1)
                    null = Text(null.states.expand(batch, -1, -1), mask)
                _same_batch("null_encoder_hidden_states", len(null.states), batch)
                if null.states.shape[1] != prompt.states.shape[1]:
                    raise ValueError(
                        f"null_encoder_hidden_states: got {null.states.shape[1]} text tokens, expected "
                        f"{prompt.states.shape[1]} as in encoder_hidden_states (pad and mask the shorter)"
                    )
            return Condition(class_labels=labels, text=prompt, null_text=null), batch
        arguments.no_text(
            config,
            encoder_hidden_states=text[0],
            encoder_attention_mask=text[1],
            null_encoder_hidden_states=null_text[0],
            null_encoder_attention_mask=null_text[1],
        )
        if config.num_classes > 0:
            labels = arguments.labels(class_labels, config, self.device)
            return Condition(class_labels=labels), len(labels)
        if class_labels is not None:
            arguments.labels(class_labels, config, self.device)
        if guided:
            raise ValueError(
                f"guidance_scale: got weights {list(weights)}, expected 1 for a model with neither classes nor text"
            )
        seeds = arguments.sequence(seed)
        if seeds is None:
            return Condition(), 1
        if not seeds:
            raise ValueError(f"seed: got {seed!r}, expected at least one seed")
        return Condition(), len(seeds)

    def _noise(self, noise: object, seed: object, batch: int) -> tuple[NoiseSource, tuple[int, ...]]:
        """The source of randomness, and the seeds that repeat it."""
        if arguments.choice("noise", noise, ("counter", "public")) == "counter":
            seeds = arguments.per_image_seeds(seed, batch)
            return CounterNoise(seeds, self.device), seeds
        stream = arguments.stream_seed(seed)
        if stream is None:
            return PublicNoise(None, self.device), ()
        return PublicNoise(torch.Generator().manual_seed(stream), self.device), (stream,)


def to_output(x: Tensor, output_type: Literal["pil", "np", "pt"]) -> Images:
    """``clamp(x / 2 + 1/2, 0, 1)`` of ``x [B, c, H, W]`` in the asked form."""
    images = (x / 2 + 0.5).clamp(0, 1).float()
    if output_type == "pt":
        return images
    array: NDArray[np.float32] = images.permute(0, 2, 3, 1).cpu().numpy()
    return array if output_type == "np" else [Image.fromarray(pixels) for pixels in to_uint8(array)]


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[..., H, W, c]`` in [0, 1] to 0..255, rounded; a single channel's axis is dropped, as Pillow wants it."""
    pixels = (images * 255).round().astype(np.uint8)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _same_batch(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{name}: got {got}, expected {expected}, one per image")

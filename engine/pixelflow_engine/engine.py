"""The public API: load a model, sample images and evaluate the velocity field."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout

from . import arguments, backends, memory
from .calls import Call, PlannedCall, Run, plan_call
from .checkpoint import Checkpoint, load_checkpoint
from .clocks import clock_of
from .compilation import compile_blocks
from .config import PixelFlowConfig
from .events import SamplingOutput, StageEvent, StageReport, Status, StepEvent
from .fusion import fuse
from .graphs import CudaCapture
from .layers import patchify, unpatchify
from .model import PackedTransformer
from .modes import without_autocast
from .output import Latents, OutputType, to_output
from .packed_stages import PackedStages, ProgramStore
from .plain_stages import PlainStages
from .plan import Condition, Solver
from .requests import Request
from .sampler import StageEnd, sample, together
from .stages import Stages


class PixelFlowEngine:
    """A PixelFlow model ready for sampling.

    Args:
        config: the model's configuration.
        model: the transformer, already in the wanted dtype and on the wanted device. The engine takes ownership of it:
            it may rearrange the weights in memory, and it replaces the model's operations with the backend's.
        backend: ``torch``, ``triton``, ``flash``, or ``auto``, which picks ``triton`` on CUDA where it can run and
            ``torch`` otherwise.
        compile: compile the transformer blocks with torch.compile; all blocks share one compiled function.
        graphs: replay steps from CUDA graphs. ``auto`` does so wherever it is possible, which requires CUDA.
        batch_sizes: run images only in batches of these sizes. This needs fewer graphs, and because it fixes the shapes
            of the matrix products, an image's bits do not depend on how many other images there are. A batch is padded
            to the next size with copies of its last image, whose results are discarded; a batch larger than the largest
            size is split into several (not possible with callbacks or ``stream``). In a list of requests, the images of
            each size are padded separately. Nothing is padded or split where an image depends on the whole batch by
            definition: with ``noise="public"`` and, for Dopri5, ``error_norm="batch"``. Prompts of a text model must in
            addition be padded to one length by the caller: rounding depends on that, too.

    With ``backend="torch"`` and without ``compile`` the engine is exact: in float32 it is bitwise equal to the
    reference model and sampler. Every other combination is faster and equal up to rounding; see docs/architecture.md.

    Raises:
        BackendUnavailableError: the requested backend cannot run here.
        ValueError: the backend is unknown, graphs are requested where they are not available, or batch sizes are not
            positive integers.
    """

    def __init__(
        self,
        config: PixelFlowConfig,
        model: PackedTransformer,
        backend: str = "auto",
        *,
        compile: bool = False,
        graphs: bool | Literal["auto"] = "auto",
        batch_sizes: Sequence[int] | None = None,
    ) -> None:
        self.backend = backends.choose(backend, model.device, model.dtype, config.model.attention_head_dim)
        self.config = config
        self.compiled = arguments.truth("compile", compile)
        self.graphs = _graphs(graphs, model.device, self.backend.name)
        self.model = model.requires_grad_(False).eval()
        self.model.operations = self.backend.operations(compile)
        if not self.exact:
            fuse(self.model)
        if compile:
            compile_blocks(self.model)
        self.model.in_halves = not compile
        self.batch_sizes = None if batch_sizes is None else arguments.batch_sizes(batch_sizes)
        self._programs = ProgramStore(CudaCapture(model.device) if self.graphs else None)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        weights: Literal["auto", "ema", "model"] = "auto",
        *,
        compile: bool = False,
        graphs: bool | Literal["auto"] = "auto",
        batch_sizes: Sequence[int] | None = None,
    ) -> PixelFlowEngine:
        """Load a checkpoint.

        Args:
            path_or_name: a folder with ``config.json`` and ``model.safetensors``, a published folder with
                ``config.yaml`` and ``model.pt``, a training checkpoint (``.pt``) beside its ``config.yaml``, a run
                directory of ``pixelflow train``, or the name of a bundled model (``digits``).
            device: the device to run on.
            dtype: dtype of weights and matrix products: float32, bfloat16, float16 or float64.
            backend, compile, graphs, batch_sizes: see :class:`PixelFlowEngine`.
            weights: which weights of a training checkpoint to load; ``auto`` takes the averaged ones if there are any.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or malformed.
            BackendUnavailableError: the requested backend cannot run here.
            ValueError: the device is not available, or the dtype is not supported.
        """
        device = arguments.place(device)
        arguments.dtype_of_weights(dtype)
        backends.choose(backend, device, dtype)  # fail before a large file is read
        checkpoint = load_checkpoint(path_or_name, weights)
        return cls.from_checkpoint(
            checkpoint, device, dtype, backend, compile=compile, graphs=graphs, batch_sizes=batch_sizes
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        *,
        compile: bool = False,
        graphs: bool | Literal["auto"] = "auto",
        batch_sizes: Sequence[int] | None = None,
    ) -> PixelFlowEngine:
        """Build an engine from a checkpoint in memory; tensors are copied only where dtype or device differ."""
        device = arguments.place(device)
        arguments.dtype_of_weights(dtype)
        with torch.device("meta"):
            model = PackedTransformer(checkpoint.config.model)
        with torch.inference_mode(False):  # weights made inside it would have no part in gradients of velocities
            state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in checkpoint.state_dict.items()}
            model.load_state_dict(state, strict=True, assign=True)
            return cls(checkpoint.config, model, backend, compile=compile, graphs=graphs, batch_sizes=batch_sizes)

    def __repr__(self) -> str:
        """Say what the engine samples, and on what it runs."""
        scheduler, resolution = self.config.scheduler, self.config.resolution
        runs = f"backend={self.backend.name!r}, compile={self.compiled}, graphs={self.graphs}"
        return (
            f"{type(self).__name__}({resolution} px in {scheduler.num_stages} stages, {self.device}, "
            f"{str(self.dtype).removeprefix('torch.')}, {runs})"
        )

    @property
    def exact(self) -> bool:
        """Whether the engine is bitwise equal to the reference in float32."""
        return self.backend.name == "torch" and not self.compiled

    @property
    def device(self) -> torch.device:
        """The device that the engine runs on."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and matrix products."""
        return self.model.dtype

    def __call__(
        self,
        class_labels: Sequence[int] | Sequence[Request] | int | Tensor | None = None,
        *,
        num_inference_steps: int | Sequence[int] = 10,
        guidance_scale: float | None = None,
        guidance_schedule: Literal["stagewise", "constant"] | Sequence[float] | None = None,
        solver: Solver = "euler",
        shift: float = 1.0,
        seed: int | Sequence[int] | None = 0,
        noise: Literal["counter", "public"] = "counter",
        state: Literal["fp32", "public"] = "fp32",
        height: int | None = None,
        width: int | None = None,
        output_type: OutputType = "pil",
        on_failure: Literal["raise", "report"] = "raise",
        callback_on_step_end: Callable[[StepEvent], Latents | None] | None = None,
        callback_on_stage_end: Callable[[StageEvent], None] | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        error_norm: Literal["image", "batch"] = "image",
        image: object = None,
        start_stage: int = 0,
        strength: float = 1.0,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        null_encoder_hidden_states: Tensor | None = None,
        null_encoder_attention_mask: Tensor | None = None,
    ) -> SamplingOutput:
        """Sample a batch of images.

        Args:
            class_labels: one per image, from 0 to ``num_classes``, where ``num_classes`` is the null class; None for a
                text model. Alternatively a list of :class:`Request`, whose images may also differ in size and guidance.
            num_inference_steps: number of steps, one for all stages or one per stage; ignored by Dopri5, which chooses
                its own steps.
            guidance_scale: largest guidance weight; 1 means no guidance. None means 2.4, or 1 for a model with neither
                classes nor text. Ignored if ``guidance_schedule`` is a list.
            guidance_schedule: ``stagewise`` grows from 1 at the first stage to ``guidance_scale`` at the last,
                ``constant`` uses ``guidance_scale`` at every stage; a list gives one weight per stage. None means
                ``constant`` for a text model and ``stagewise`` for others, as published.
            solver: ``euler``; ``heun`` (two evaluations per step) and ``ab2`` (Adams-Bashforth, one per step), both of
                second order; or ``dopri5``, which chooses its own steps.
            shift: time shift of fixed steps; must be 1 for Dopri5.
            seed: with ``noise="counter"``: one seed per image, or the seed of the first image, from which the others
                count up, or None for fresh seeds; a :class:`Request` may have its own. With ``noise="public"``: the
                seed of the single random stream, or None for torch's global generator.
            noise: ``counter``: each image's noise depends only on its own seed. ``public``: the published code's CPU
                random stream.
            state: ``fp32``, or ``public`` to keep the state in the velocity's dtype as the published code does.
            height, width: image size in pixels; defaults to the model's resolution.
            output_type: ``pil``, ``np`` or ``pt``; see :class:`SamplingOutput`.
            on_failure: ``raise``, or ``report`` to record failures in ``statuses`` and continue. An image that fails
                never affects another one, unless they share ``error_norm="batch"``.
            callback_on_step_end: called after every step; may return other latents to continue with (see
                :class:`StepEvent`).
            callback_on_stage_end: called after every stage.
            rtol, atol, error_norm: error control of Dopri5; see :class:`pixelflow_engine.solvers.Tolerance`.
            image: images to start from, one or one per image: PIL images, an array ``[B, H, W, c]`` or a tensor
                ``[B, c, H, W]`` in [0, 1].
            start_stage: the stage that starts from ``image``, from 0. The smaller it is, the less of the image is kept:
                a stage other than the first starts from the image at half its resolution, with noise added.
            strength: fraction of that stage's steps to run, in (0, 1], so that a smaller one keeps more of the image; 1
                runs all of them, which the first stage would start from pure noise, and is refused there.
            encoder_hidden_states: encoded prompts ``[B, L, E]``, for a text model.
            encoder_attention_mask: ``[B, L]``, 1 for tokens and 0 for padding.
            null_encoder_hidden_states, null_encoder_attention_mask: the encoded empty prompt, ``[B, L, E]`` or
                ``[1, L, E]``, and its mask; required where a guidance weight is not 1. If prompts and empty prompts
                differ in length, the shorter ones are padded.

        Raises:
            ValueError: an argument is invalid; the message names it, its value and what was expected.
            FloatingPointError: an image is not finite at the end of a stage.
            ConvergenceError: Dopri5 could not meet its tolerance.

        Source: arXiv 2504.07963, section 3.4.
        """
        call = Call(
            class_labels=class_labels,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            solver=solver,
            shift=shift,
            seed=seed,
            noise=noise,
            state=state,
            height=height,
            width=width,
            output_type=output_type,
            on_failure=on_failure,
            callback_on_step_end=callback_on_step_end,
            callback_on_stage_end=callback_on_stage_end,
            rtol=rtol,
            atol=atol,
            error_norm=error_norm,
            image=image,
            start_stage=start_stage,
            strength=strength,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            null_encoder_hidden_states=null_encoder_hidden_states,
            null_encoder_attention_mask=null_encoder_attention_mask,
        )
        planned = self._plan(call)
        images: dict[int, Tensor] = {}
        statuses: dict[int, Status] = {}
        reported: list[list[Callable[[], StageReport]]] = []
        for run in planned.runs:
            stages = []
            for end in self._stages_of(run, planned, watched=False):
                stages.append(end.reported)
            reported.append(stages)
            statuses |= end.statuses()
            latents = end.latents
            images |= zip(sorted({*run.lot.order}), latents, strict=True)
        if len(planned.runs) > 1:
            latents = together([images[i] for i in range(planned.batch)])
        return SamplingOutput(
            images=to_output(latents, planned.output_type),
            stages=tuple(StageReport.together([report() for report in stage]) for stage in zip(*reported, strict=True)),
            seeds=planned.seeds,
            statuses=tuple(statuses[i] for i in range(planned.batch)),
        )

    def stream(self, class_labels: Any = None, **options: Any) -> Iterator[StageEvent]:
        """Sample stage by stage, for previews or to stop early.

        Args:
            class_labels, options: as in :meth:`__call__`; all images must run as one batch.

        Yields:
            the end of each stage, smallest first; ``event.images(output_type)`` converts its state to images.

        Raises:
            ValueError: as in :meth:`__call__`, before anything runs.
        """
        for name in options.keys() - {field.name for field in fields(Call)}:
            raise TypeError(f"stream() got an unexpected keyword argument {name!r}")
        planned = self._plan(Call(class_labels=class_labels, **options))
        if len(planned.runs) > 1:
            raise ValueError(
                f"class_labels: got images that run as {len(planned.runs)} batches here, expected one size and guidance"
            )
        (run,) = planned.runs
        return (end.event for end in self._stages_of(run, planned, watched=True))

    def warmup(self, batch_sizes: Sequence[int] = (1,), **options: Any) -> None:
        """Compile kernels and capture graphs for calls of these batch sizes, so that the first real call is fast.

        Args:
            batch_sizes: numbers of images.
            options: keyword arguments that the real calls will have: ``solver``, ``height``, ``guidance_scale``,
                prompts of the same length. Prompts of any number of images are repeated or cut to each batch size; an
                empty prompt for all images remains one.

        Raises:
            ValueError: as in :meth:`__call__`.
        """
        several = arguments.sequence(batch_sizes)
        if several is None:
            raise ValueError(f"batch_sizes: got {batch_sizes!r}, expected a list of integers of at least 1")
        for number in [arguments.positive_integer(f"batch_sizes[{i}]", size) for i, size in enumerate(several)]:
            labels = [0] * number if self.config.model.num_classes > 0 else None
            seed = 0 if options.get("noise") == "public" else list(range(number))
            least: dict[str, Any] = {"num_inference_steps": 2, "seed": seed, "output_type": "pt"}
            if (
                "num_inference_steps" not in options
                and arguments.finite_number("strength", options.get("strength", 1)) < 1
            ):
                least["num_inference_steps"], options = 4, options | {"strength": 0.5}  # two steps of the first stage
            self(labels, **(least | options | _prompts_of(number, options)))

    def close(self) -> None:
        """Release captured graphs and their memory. The engine remains usable and captures again when needed."""
        self._programs.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: programs and graphs cannot be, and a copy without them would be slow."""
        raise TypeError(
            "an engine cannot be copied or pickled: make another with from_pretrained, in the process that uses it"
        )

    def _plan(self, call: Call) -> PlannedCall:
        return plan_call(call, self.config, self.device, self.dtype, not self.exact, self.batch_sizes)

    def _stages_of(self, run: Run, planned: PlannedCall, watched: bool) -> Iterator[StageEnd]:
        stages: Stages
        if self.exact:
            stages = PlainStages(self.model, self.config, run.plan, run.condition)
        else:
            stages = PackedStages(self.model, self.config, run.plan, run.condition, self._programs)
        patch, order = self.config.model.patch_size, run.lot.order
        table = not self.exact and run.plan.solver != "dopri5"
        least = memory.least_bytes(self.config.model, run.plan.stages, self.dtype, table)
        with memory.told_what_fits(self.device, len(order), least):
            yield from sample(
                stages,
                run.plan,
                run.start(),
                run.noise,
                patch,
                planned.callbacks,
                order,
                clock_of(self.device),
                planned.raising,
                watched,
                planned.seeds,
            )

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
        """Evaluate the model's velocity without guidance, for custom samplers; differentiable with respect to ``x``.

        Args:
            x: images ``[B, c, h, w]``; h and w are multiples of the patch size.
            t_model: time on the 0..999 axis, one value or one per image.
            class_labels: one per image; ``num_classes`` is the null class.
            latent_size: width in tokens, one value or one per image; defaults to that of ``x``.
            encoder_hidden_states, encoder_attention_mask: encoded prompts ``[B, L, E]`` and mask ``[B, L]``.

        Returns:
            ``[B, c, h, w]`` in the dtype of ``x``.

        Raises:
            ValueError: an argument is invalid; the message names it, its value and what was expected.
        """
        model, config = self.model, self.config.model
        x = arguments.images(x, config)
        batch, _, height, width = x.shape
        p = config.patch_size
        labels, text = None, None
        if config.num_classes > 0:
            labels = arguments.labels(class_labels, config)
            arguments.same_batch("class_labels", len(labels), batch)
        elif class_labels is not None:
            arguments.labels(class_labels, config)
        if config.cross_attention_dim is None:
            arguments.no_text(
                config, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask
            )
        else:
            text = arguments.text("", encoder_hidden_states, encoder_attention_mask, config)
            arguments.same_batch("encoder_hidden_states", len(text.states), batch)
        size = width // p if latent_size is None else latent_size
        times = arguments.per_image("t_model", t_model, batch, self.device, torch.float32)
        sizes = arguments.per_image("latent_size", size, batch, self.device, torch.int64)
        arguments.mask_values("", text)
        condition = Condition(labels, text).to(self.device, self.dtype)
        layout = PackedLayout.from_grids([(height // p, width // p)] * batch, self.device)
        with without_autocast(self.device):
            tokens = model(patchify(x.to(self.device), p), times, layout, sizes, condition.class_labels, condition.text)
        return unpatchify(tokens, (batch, config.out_channels, height, width), p).to(x.dtype)


def _prompts_of(batch: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """The prompts among the options of a warm-up, repeated or cut to ``batch`` images."""
    prompts = {}
    for kind in ("hidden_states", "attention_mask"):
        for name, fewest in ((f"encoder_{kind}", 1), (f"null_encoder_{kind}", 2)):  # one empty prompt is for all images
            value = options.get(name)
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) >= fewest:
                prompts[name] = value[torch.arange(batch, device=value.device) % len(value)]
    return prompts


def _graphs(graphs: object, device: torch.device, backend: str) -> bool:
    """Whether steps are replayed from CUDA graphs."""
    if not isinstance(graphs, bool) and graphs != "auto":
        raise ValueError(f"graphs: got {graphs!r}, expected True, False or 'auto'")
    why_not = None
    if device.type != "cuda":
        why_not = f"CUDA graphs need a CUDA device, and the model is on {device}"
    elif backend == "torch":
        why_not = "PyTorch's attention (backend='torch') reads the images' lengths on the host"
    if graphs is True and why_not is not None:
        raise ValueError(f"graphs: got True, but {why_not}")
    return graphs is not False and why_not is None

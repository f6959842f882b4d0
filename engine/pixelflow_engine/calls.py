"""Arguments of an engine call and the plan built from them. Everything is checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from pixelflow_kernels.transfers import uploaded

from . import arguments, guidance
from .config import PixelFlowConfig
from .events import Callbacks, StageEvent, StepEvent
from .image_to_image import taken_up
from .noise import CounterNoise, NoiseSource, PublicNoise
from .output import OUTPUT_TYPES, Latents, OutputType, from_images
from .plan import SOLVERS, Condition, SamplingPlan, Solver, plan_stages
from .requests import Lot, Request, padded, sort_into_lots
from .schedule import step_times
from .solvers import Tolerance
from .stages import States


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Call:
    """Arguments of :meth:`pixelflow_engine.PixelFlowEngine.__call__`, which documents each of them."""

    class_labels: Sequence[int] | Sequence[Request] | int | Tensor | None = None
    num_inference_steps: int | Sequence[int] = 10
    guidance_scale: float | None = None
    guidance_schedule: Literal["stagewise", "constant"] | Sequence[float] | None = None
    solver: Solver = "euler"
    shift: float = 1.0
    seed: int | Sequence[int] | None = 0
    noise: Literal["counter", "public"] = "counter"
    state: Literal["fp32", "public"] = "fp32"
    height: int | None = None
    width: int | None = None
    output_type: OutputType = "pil"
    on_failure: Literal["raise", "report"] = "raise"
    callback_on_step_end: Callable[[StepEvent], Latents | None] | None = None
    callback_on_stage_end: Callable[[StageEvent], None] | None = None
    rtol: float = 1e-3
    atol: float = 1e-6
    error_norm: Literal["image", "batch"] = "image"
    image: object = None
    start_stage: int = 0
    strength: float = 1.0
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    null_encoder_hidden_states: Tensor | None = None
    null_encoder_attention_mask: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """Images that run together as one batch, and everything needed to run them.

    Attributes:
        lot: the images of this batch.
        plan: what each stage does.
        condition: class labels and prompts of the images.
        noise: noise source of each group.
        start: creates the states that the first stage starts from.
    """

    lot: Lot
    plan: SamplingPlan
    condition: Condition
    noise: tuple[NoiseSource, ...]
    start: Callable[[], States]


@dataclass(frozen=True, eq=False, slots=True)
class PlannedCall:
    """A call that has passed all checks.

    Attributes:
        runs: the batches, which run one after another.
        batch: number of images.
        seeds: seeds that reproduce the noise.
        output_type: form of the returned images.
        raising: whether a failed image raises an error.
        callbacks: the caller's callbacks.
    """

    runs: tuple[Run, ...]
    batch: int
    seeds: tuple[int, ...]
    output_type: OutputType
    raising: bool
    callbacks: Callbacks


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """What a call requests for each image.

    Attributes:
        condition: class labels and prompts as given: checked except for the values of masks, not yet moved to a device.
        sizes: height and width of each image in pixels.
        weights: guidance weights of each image, one per stage.
        seeds: what the caller passed as ``seed``; for requests, one seed per image.
    """

    condition: Condition
    sizes: list[tuple[int, int]]
    weights: list[tuple[float, ...]]
    seeds: object


def plan_call(
    call: Call,
    config: PixelFlowConfig,
    device: torch.device,
    dtype: torch.dtype,
    packed: bool,
    batch_sizes: Sequence[int] | None = None,
) -> PlannedCall:
    """Check a call and plan it.

    Args:
        call: the arguments.
        config: the model's configuration.
        device, dtype: device and dtype of the model.
        packed: whether images of any sizes and weights can run as one pack (with fixed steps only).
        batch_sizes: the engine's batch sizes, if restricted.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and what was expected.
    """
    _check_words(call, config)
    if call.guidance_scale is None:
        call = replace(call, guidance_scale=guidance.default_scale(config.model))
    if call.guidance_schedule is None:
        call = replace(call, guidance_schedule=guidance.default_schedule(config.model))
    asked = _requested(call, config) if _is_mixed(call) else _uniform(call, config)
    batch = len(asked.sizes)
    steps = arguments.steps(call.num_inference_steps, config.scheduler.num_stages)
    tolerance = Tolerance(
        rtol=arguments.positive_number("rtol", call.rtol),
        atol=arguments.positive_number("atol", call.atol),
        error_norm=call.error_norm,
    )
    shift = arguments.positive_number("shift", call.shift)
    if call.state != "fp32" and call.solver != "euler":
        raise ValueError(f"state: got {call.state!r} with solver={call.solver!r}, expected 'fp32': it is Euler's alone")
    if call.state != "fp32" and packed:
        raise ValueError("state: got 'public', expected 'fp32' but for backend='torch' without compile")
    if call.solver == "dopri5" and shift != 1.0:
        raise ValueError(f"shift: got {shift} with solver='dopri5', expected 1: its steps are its own")
    if call.noise == "public" or (call.solver == "dopri5" and call.error_norm == "batch"):
        batch_sizes = None  # an image depends on the whole batch by definition
    lots = sort_into_lots(asked.sizes, asked.weights, packed and call.solver != "dopri5", batch_sizes)
    callbacks = Callbacks(call.callback_on_step_end, call.callback_on_stage_end)
    if len(lots) > 1 and callbacks != Callbacks():
        raise ValueError(
            f"callback_on_step_end, callback_on_stage_end: got one for images that run as {len(lots)} batches here, "
            "expected None, or images of one size and guidance"
        )
    sources, seeds = _noise(call, asked.seeds, batch, device)
    strength = arguments.finite_number("strength", call.strength)
    first, given = _given_image(call, config, lots, strength)
    first_step = _first_step(call.solver, steps[first], strength, first, given is not None)
    arguments.mask_values("", asked.condition.text)
    arguments.mask_values("null_", asked.condition.null_text)
    runs = []
    for lot in lots:
        noise = tuple(sources(places) for places in lot.places)
        beginning, *others = plan_stages(config, lot.groups, steps)[first:]
        stages = (replace(beginning, first_step=first_step), *others)
        plan = SamplingPlan(stages=stages, solver=call.solver, shift=shift, state=call.state, tolerance=tolerance)
        condition = lot.of(asked.condition).to(device, dtype)
        runs.append(Run(lot, plan, condition, noise, _start(plan, config, noise, given, lot, device)))
    return PlannedCall(tuple(runs), batch, seeds, call.output_type, call.on_failure == "raise", callbacks)


# --- what is asked of each image ---------------------------------------------------------------------------


def _check_words(call: Call, config: PixelFlowConfig) -> None:
    arguments.choice("solver", call.solver, SOLVERS)
    arguments.choice("state", call.state, ("fp32", "public"))
    arguments.choice("output_type", call.output_type, OUTPUT_TYPES)
    arguments.choice("on_failure", call.on_failure, ("raise", "report"))
    arguments.choice("error_norm", call.error_norm, ("image", "batch"))
    arguments.choice("noise", call.noise, ("counter", "public"))
    arguments.callback("callback_on_step_end", call.callback_on_step_end)
    arguments.callback("callback_on_stage_end", call.callback_on_stage_end)
    if call.output_type == "pil" and config.model.out_channels not in (1, 3):
        raise ValueError(
            f"output_type: got 'pil', expected 'np' or 'pt' for images of {config.model.out_channels} channels"
        )


def _is_mixed(call: Call) -> bool:
    several = call.class_labels
    return isinstance(several, Sequence) and len(several) > 0 and any(isinstance(r, Request) for r in several)


def _uniform(call: Call, config: PixelFlowConfig) -> Asked:
    """Resolve a call whose images differ only in their condition and seeds."""
    num_stages = config.scheduler.num_stages
    weights = arguments.guidance_weights(call.guidance_scale, call.guidance_schedule, num_stages)
    size = (
        arguments.image_size("height", call.height, config),
        arguments.image_size("width", call.width, config),
    )
    condition, batch = _condition(call, config, weights)
    return Asked(condition, [size] * batch, [weights] * batch, call.seed)


def _requested(call: Call, config: PixelFlowConfig) -> Asked:
    """Resolve a call whose images may differ in anything that a :class:`Request` specifies."""
    requests = cast("Sequence[Request]", call.class_labels)
    for i, request in enumerate(requests):
        if not isinstance(request, Request):
            raise ValueError(f"class_labels[{i}]: got {request!r}, expected a Request like the others")
    if call.noise != "counter":
        raise ValueError(f"noise: got {call.noise!r}, expected 'counter' for requests: each image has its own stream")
    if call.image is not None:
        raise ValueError("image: got one beside requests, expected None")
    sizes: list[tuple[int, int]] = []
    weights: list[tuple[float, ...]] = []
    labels: list[int] = []
    prompts: list[Tensor] = []
    seeds = [*arguments.per_image_seeds(call.seed, len(requests))]
    own_prompts = any(r.encoder_hidden_states is not None for r in requests)
    num_stages = config.scheduler.num_stages
    common = arguments.guidance_weights(call.guidance_scale, call.guidance_schedule, num_stages)
    height = arguments.image_size("height", call.height, config)
    width = arguments.image_size("width", call.width, config)
    for i, r in enumerate(requests):
        with arguments.inside(f"class_labels[{i}]"):
            if r.guidance_scale is not None and arguments.sequence(call.guidance_schedule) is not None:
                raise ValueError(
                    f"guidance_scale: got {r.guidance_scale!r} beside a list in guidance_schedule, expected None: "
                    "the list has a weight for each stage"
                )
            own = r.guidance_scale
            weights.append(
                common if own is None else arguments.guidance_weights(own, call.guidance_schedule, num_stages)
            )
            sizes.append(
                (
                    height if r.height is None else arguments.image_size("height", r.height, config),
                    width if r.width is None else arguments.image_size("width", r.width, config),
                )
            )
            if r.seed is not None:
                seeds[i] = arguments.seed("seed", r.seed)
            if config.model.num_classes > 0 or r.class_label is not None:
                labels.append(arguments.label("class_label", r.class_label, config.model))
            if config.model.cross_attention_dim is None:
                arguments.no_text(config.model, encoder_hidden_states=r.encoder_hidden_states)
            elif own_prompts:
                prompts.append(arguments.prompt(r.encoder_hidden_states, config.model))
    plain = replace(call, class_labels=labels or None, seed=seeds)
    if own_prompts:
        beside = {"hidden_states": call.encoder_hidden_states, "attention_mask": call.encoder_attention_mask}
        for name in (name for name, value in beside.items() if value is not None):
            raise ValueError(f"encoder_{name}: got one beside requests that have prompts, expected None")
        arguments.same_device("encoder_hidden_states", prompts)
        states, mask = padded(prompts)
        plain = replace(plain, encoder_hidden_states=states, encoder_attention_mask=mask)
    condition, count = _condition(plain, config, [w for several in weights for w in several])
    arguments.same_batch("encoder_hidden_states", count, len(requests))
    return Asked(condition, sizes, weights, seeds)


def _condition(call: Call, config: PixelFlowConfig, weights: Sequence[float]) -> tuple[Condition, int]:
    """The condition and the number of images; ``weights`` are the guidance weights of all images."""
    model = config.model
    guided = any(weight != 1 for weight in weights)
    if model.cross_attention_dim is not None:
        return _text_condition(call, config, guided)
    arguments.no_text(
        model,
        encoder_hidden_states=call.encoder_hidden_states,
        encoder_attention_mask=call.encoder_attention_mask,
        null_encoder_hidden_states=call.null_encoder_hidden_states,
        null_encoder_attention_mask=call.null_encoder_attention_mask,
    )
    if model.num_classes > 0:
        labels = arguments.labels(call.class_labels, model)
        return Condition(class_labels=labels), len(labels)
    if call.class_labels is not None:
        arguments.labels(call.class_labels, model)
    if guided:
        raise ValueError(
            f"guidance_scale: got weights {list(weights)}, expected 1 for a model with neither classes nor text"
        )
    seeds = arguments.sequence(call.seed)
    if seeds is None:
        return Condition(), 1
    if not seeds:
        raise ValueError(f"seed: got {call.seed!r}, expected at least one seed")
    return Condition(), len(seeds)


def _text_condition(call: Call, config: PixelFlowConfig, guided: bool) -> tuple[Condition, int]:
    model = config.model
    if call.class_labels is not None and model.num_classes == 0:
        arguments.labels(call.class_labels, model)
    prompt = arguments.text("", call.encoder_hidden_states, call.encoder_attention_mask, model)
    batch = len(prompt.states)
    labels = None
    if model.num_classes > 0:
        labels = arguments.labels(call.class_labels, model)
        arguments.same_batch("class_labels", len(labels), batch)
    null = None
    if guided:
        null = arguments.text("null_", call.null_encoder_hidden_states, call.null_encoder_attention_mask, model)
        if len(null.states) != 1:
            arguments.same_batch("null_encoder_hidden_states", len(null.states), batch)
        longest = max(prompt.states.shape[1], null.states.shape[1])
        prompt, null = prompt.padded(longest), null.padded(longest)
    return Condition(class_labels=labels, text=prompt, null_text=null), batch


# --- randomness and the beginning --------------------------------------------------------------------------


def _noise(
    call: Call, seed: object, batch: int, device: torch.device
) -> tuple[Callable[[Sequence[int]], NoiseSource], tuple[int, ...]]:
    """A factory of noise sources for subsets of the images, and the seeds that reproduce the noise."""
    if call.noise == "counter":
        seeds = arguments.per_image_seeds(seed, batch)
        return lambda places: CounterNoise(tuple(seeds[i] for i in places), device), seeds
    stream = arguments.stream_seed(seed)
    source = PublicNoise(None if stream is None else torch.Generator("cpu").manual_seed(stream), device)
    return lambda places: source, () if stream is None else (stream,)


def _given_image(
    call: Call, config: PixelFlowConfig, lots: Sequence[Lot], strength: float
) -> tuple[int, Tensor | None]:
    """The index of the first stage, and the image to start from (None to start from noise)."""
    first = arguments.integer(call.start_stage)
    if first is None or not 0 <= first < config.scheduler.num_stages:
        last = config.scheduler.num_stages - 1
        raise ValueError(f"start_stage: got {call.start_stage!r}, expected an integer from 0 to {last}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {call.strength!r}, expected a number above 0, at most 1")
    if call.image is None:
        if first != 0 or strength != 1:
            raise ValueError(
                f"image: got None with start_stage={first} and strength={strength}, expected an image to begin from"
            )
        return 0, None
    if call.solver == "dopri5" and strength != 1:
        raise ValueError(f"strength: got {strength} with solver='dopri5', expected 1: it integrates whole stages")
    if call.noise != "counter":
        raise ValueError(f"noise: got {call.noise!r}, expected 'counter' to begin from an image")
    image = from_images(call.image, config.model.in_channels)
    (group,) = lots[0].groups
    if image.shape[2:] != (group.height, group.width):
        raise ValueError(
            f"image: got {image.shape[2]} x {image.shape[3]} pixels, expected {group.height} x {group.width}"
        )
    batch = len({place for lot in lots for place in lot.order})
    if len(image) not in (1, batch):
        raise ValueError(f"image: got {len(image)}, expected 1 or {batch}, one per image")
    return first, image.expand(batch, -1, -1, -1)


def _first_step(solver: Solver, num_steps: int, strength: float, stage: int, given: bool) -> int:
    """The step at which the first stage begins; ``strength`` is the share of its steps that are run."""
    first_step = num_steps - max(1, round(strength * num_steps))
    if given and stage == 0 and first_step == 0:
        could_be_less = solver != "dopri5" and num_steps > 1
        raise ValueError(
            f"strength: got {strength} with start_stage=0, where the whole stage would run, from pure noise, and no "
            f"bit would depend on the image; expected {'less, or ' if could_be_less else ''}a later stage"
        )
    return first_step


def _start(
    plan: SamplingPlan,
    config: PixelFlowConfig,
    noise: Sequence[NoiseSource],
    given: Tensor | None,
    lot: Lot,
    device: torch.device,
) -> Callable[[], States]:
    """A function that makes the initial states: noise, or the given image as training shows it to the first stage."""
    first = plan.stages[0]

    def start() -> States:
        normals = [source.initial(shape) for source, shape in zip(noise, first.shapes, strict=True)]
        if given is None:
            return normals
        tau, _ = step_times(first.stage, config.scheduler, first.num_steps, plan.shift)
        images = uploaded(given[list(lot.order)], device)
        num_stages = config.scheduler.num_stages
        return [taken_up(images, normals[0], first.stage, num_stages, float(tau[first.first_step]))]

    return start

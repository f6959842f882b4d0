"""One Euler step for images that are each at their own stage and time, with their own guidance weight.

This is the building block for a server that admits and releases images between any two steps. The server keeps the
states, plans the times (:mod:`pixelflow_engine.schedule`) and moves images from stage to stage
(:meth:`NoiseSource.enter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelflow_kernels import ode_step
from pixelflow_kernels.transfers import numbers, uploaded

from . import arguments
from .fusion import follow_weights
from .layers import at_least_fp32
from .model import PackedTransformer
from .modes import without_autocast
from .plan import Condition, StagePlan
from .schedule import Stage
from .stage_pack import StagePack

NOWHERE = Stage(index=0, start=0.0, end=1.0, window=(0.0, 0.0), alpha=1.0, beta=0.0)
"""Placeholder stage for such a pack, whose images are at stages of their own; its values are not read."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Underway:
    """An image between two steps.

    Attributes:
        latents: its state ``[c, h, w]``, at any stage.
        t_model: model time of the state, 0 to 999.
        step: length of the step to take, in local time.
        weight: guidance weight; at exactly 1 the null half is not computed.
        class_label: for a class-conditional model.
    """

    latents: Tensor
    t_model: float
    step: float
    weight: float = 1.0
    class_label: int | None = None


@torch.no_grad()
def euler_step(model: PackedTransformer, images: Sequence[Underway]) -> list[Tensor]:
    """Take one Euler step for every image, all in one pack.

    Args:
        model: a class-conditional or unconditional transformer with concatenated weights
            (:mod:`pixelflow_engine.fusion`).
        images: images of any sizes, in any order.

    Returns:
        the states after the step, in the same order, in at least float32.

    Raises:
        ValueError: the model is a text model; or there is no image, or a class label is missing or not one of the
            model's; the message names it.

    Source: arXiv 2504.07963, section 3.4.
    """
    if not images:
        raise ValueError("images: got none, expected at least one")
    if model.config.cross_attention_dim is not None:
        raise ValueError("model: got a text model, expected a class-conditional or unconditional one")
    classes = model.config.num_classes
    for i, image in enumerate(images):
        if classes > 0 or image.class_label is not None:
            arguments.label(f"images[{i}].class_label", image.class_label, model.config)
    with without_autocast(model.device):
        return _moved(model, images)


def _moved(model: PackedTransformer, images: Sequence[Underway]) -> list[Tensor]:
    order = sorted(range(len(images)), key=lambda i: images[i].weight == 1)  # images with a null half first
    pack_images = [images[i] for i in order]
    device, high = model.device, at_least_fp32(model.dtype)
    plan = StagePlan(
        stage=NOWHERE,
        shapes=tuple((1, *image.latents.shape) for image in pack_images),
        weights=tuple(image.weight for image in pack_images),
        num_steps=1,
    )
    follow_weights(model)
    pack = StagePack(model, plan)
    x = pack.pack([image.latents[None].to(device, high) for image in pack_images])
    labels = [image.class_label for image in pack_images if image.class_label is not None]
    told = numbers(labels, torch.int64, device) if labels else None
    times = [image.t_model for image in pack_images]
    c = model.conditioning(
        numbers(times[: plan.guided] + times, torch.float32, device),
        pack.latent_size,
        pack.labels(Condition(class_labels=told)),
    )
    velocity = pack.velocity(x, model.modulations(c), model.surroundings(pack.layout, None))
    sizes = torch.tensor(pack.sizes, device="cpu")
    steps, weights = (
        uploaded(torch.tensor(values, dtype=torch.float64, device="cpu").repeat_interleave(sizes), device)
        for values in ([image.step for image in pack_images], plan.weights)
    )
    guided = pack.guided_tokens  # the update treats every token as an image
    if guided:
        ode_step.euler_step_(x[:guided], velocity[: 2 * guided], steps[:guided], weights[:guided])
    if guided < pack.tokens:
        ode_step.euler_step_(x[guided:], velocity[2 * guided :], steps[guided:])
    moved = pack.unpack(x)
    return [moved[order.index(i)][0] for i in range(len(images))]

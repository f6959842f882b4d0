"""Checks that a variant trains correctly: its batches, losses and gradients, and the effect of a step on the weights.

The truth is the reference model in float64, image by image, on one given batch. The yardstick is the reference in the
problem's own type, again image by image: twice its error plus two roundings of the value are allowed (level D). Errors
are those of whole vectors: the largest over the images for losses, the Euclidean norm for each parameter's gradient.
Gradient norms may differ by the error of all gradients together, which is bounded in the same way.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pixelflow_benchmarks.opponents.random_models import random_reference
from pixelflow_engine.layers import unpatchify
from pixelflow_engine.reference import PixelFlowTransformer, make_stages
from pixelflow_engine.reference.training import down, training_pair, up
from pixelflow_training.collate import Batch
from pixelflow_training.data import ImageSet, to_signed

from .problem import Gradients, TrainingProblem

ADAM_STEPS = 10.0**0.5
"""Upper bound of an Adam step in learning rates: no weight moves by more than ``(1 - beta1) / sqrt(1 - beta2)``."""


def reference_gradients(
    problem: TrainingProblem, weights: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype
) -> Gradients:
    """Compute the reference model's losses and gradients, image by image.

    Args:
        problem: the problem, for its device and, unless ``dtype`` is float64, its autocast.
        weights: weights of the model.
        batch: batch on the CPU.
        dtype: type of the weights: float64 or float32.
    """
    model = random_reference(problem.config, weights, dtype).requires_grad_(True)
    # Keep the activations of only one block at a time: in float64 attention materialises its logits.
    _recompute(model)
    pixels = [images_of(tokens, batch, problem.config.model.patch_size) for tokens in (batch.tokens, batch.targets)]
    losses = []
    for i, (x, target) in enumerate(zip(*pixels, strict=True)):
        arguments = [batch.t_model[i : i + 1], None if batch.labels is None else batch.labels[i : i + 1]]
        t_model, label = (None if value is None else value.to(problem.device) for value in arguments)
        with torch.autocast(problem.device.type, torch.bfloat16, enabled=dtype != torch.float64 and problem.casts):
            v = model(x.to(problem.device, dtype), t_model, label)
        loss = (v.to(dtype) - target.to(problem.device, dtype)).square().mean()
        (loss / len(pixels[0])).backward()
        losses.append(loss.detach().cpu())
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    del model
    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
    return Gradients(torch.stack(losses), found)


def images_of(tokens: Tensor, batch: Batch, patch_size: int) -> list[Tensor]:
    """Split a pack's tokens into images, ``[1, c, h, w]`` each."""
    parts = tokens.split([rows * columns for rows, columns in batch.layout.grids])
    p = patch_size
    return [
        unpatchify(part, (1, part.shape[1] // p**2, rows * p, columns * p), p)
        for part, (rows, columns) in zip(parts, batch.layout.grids, strict=True)
    ]


@dataclass(frozen=True, eq=False, slots=True)
class Expected:
    """Expected losses and gradients, and the bounds of their errors.

    Attributes:
        truth: the reference's losses and gradients in float64.
        norm: norm of all these gradients together.
        loss_bound: bound of the largest error of a loss.
        bounds: bound of the Euclidean norm of each gradient's error, by parameter.
        norm_bound: bound of the error of the gradient norm.
    """

    truth: Gradients
    norm: float
    loss_bound: float
    bounds: dict[str, float]
    norm_bound: float

    @classmethod
    def of(cls, plain: Gradients, truth: Gradients, dtype: torch.dtype) -> Expected:
        """Derive the bounds from the reference's own errors.

        Args:
            plain: the reference's losses and gradients in the problem's type.
            truth: the reference's losses and gradients in float64.
            dtype: the problem's type, whose roundings are granted.
        """
        unit, norm = torch.finfo(dtype).eps / 2, truth.norm
        errors = {name: _length(plain.by_name[name].double() - true) for name, true in truth.by_name.items()}
        return cls(
            truth=truth,
            norm=norm,
            loss_bound=2 * _largest(plain.losses - truth.losses) + 2 * unit * _largest(truth.losses),
            bounds={name: 2 * error + 2 * unit * _length(truth.by_name[name]) for name, error in errors.items()},
            norm_bound=2 * sum(error**2 for error in errors.values()) ** 0.5 + 2 * unit * norm,
        )


def gradient_faults(found: Gradients, expected: Expected) -> list[str]:
    """Return where losses, gradients or their norm miss level D; of the parameters, the worst is named."""
    truth = expected.truth
    if found.by_name.keys() != truth.by_name.keys():
        names = sorted(found.by_name.keys() ^ truth.by_name.keys())
        return [f"{len(names)} parameters have a gradient on one side alone: {names[0]}, ..."]
    faults = []
    if not (error := _largest(found.losses.double() - truth.losses)) <= expected.loss_bound:
        faults.append(f"loss: error {error:.3e}, bound {expected.loss_bound:.3e}")
    missed: dict[str, tuple[float, float]] = {}
    for name, true in truth.by_name.items():
        error, allowed = _length(found.by_name[name].double() - true), expected.bounds[name]
        if not error <= allowed:
            missed[name] = error, allowed
    if missed:
        worst = max(missed, key=lambda name: _times(*missed[name]))
        error, allowed = missed[worst]
        others = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        faults.append(f"gradient of {worst}{others}: error {error:.3e}, bound {allowed:.3e}")
    if not (error := abs(found.norm - expected.norm)) <= expected.norm_bound:
        faults.append(f"gradient norm: error {error:.3e}, bound {expected.norm_bound:.3e}")
    return faults


def batch_faults(batch: Batch, problem: TrainingProblem, data: ImageSet) -> list[str]:
    """Return what is wrong with a batch made by a variant.

    Every image must be the training pair of a different image of the data set, the stages must have equally many
    images, and the noise must have mean 0 and variance 1. The noise follows from the target, which is linear in it, and
    then determines the noisy image.
    """
    config = problem.config
    stages, p = make_stages(config.scheduler.num_stages), config.model.patch_size
    if torch.bincount(batch.stage, minlength=len(stages)).tolist() != [problem.batch // len(stages)] * len(stages):
        return [f"batch: got stages {batch.stage.tolist()}, expected equally many of each"]
    if sorted((r * c for r, c in batch.layout.grids), reverse=True) != problem.lengths:
        return [f"batch: got grids {batch.layout.grids}, expected those of the stages"]
    noisy, targets = (images_of(tokens, batch, p) for tokens in (batch.tokens, batch.targets))
    seen: set[int] = set()
    noises = []
    for i, index in enumerate(batch.stage.tolist()):
        stage = stages[index]
        k = int((stage.model_times - batch.t_model[i].double()).abs().argmin())
        if abs(stage.model_times[k].item() - batch.t_model[i].item()) > 1e-4:
            return [f"batch: image {i} has model time {batch.t_model[i].item()}, which is none of its stage's"]
        label = None if batch.labels is None else int(batch.labels[i])
        found = None
        for candidate in _candidates(data, label, config.model.num_classes, seen):
            image = to_signed(data.images[candidate]).double()
            sharp = down(image, len(stages) - 1 - index)
            coarse = up(down(image, len(stages) - index))
            eps = (targets[i][0].double() - stage.end * sharp + stage.start * coarse) / (stage.start - stage.end)
            x = training_pair(image, stage, len(stages), k, eps)[0]
            # A dozen float32 roundings of values up to 1 + |eps|, amplified by the division above.
            tolerance = 16 * 2.0**-24 * (1 + eps.abs().max().item()) / (stage.end - stage.start)
            if (noisy[i][0].double() - x).abs().max().item() <= tolerance:
                found = candidate
                noises.append(eps.flatten())
                break
        if found is None:
            return [f"batch: image {i}, stage {index}, is the training pair of no image that is left"]
        seen.add(found)
    noise = torch.cat(noises)
    spread = 6 / len(noise) ** 0.5
    if abs(noise.mean().item()) > spread or abs(noise.var().item() - 1) > 2**0.5 * spread:
        return [f"batch: noise of mean {noise.mean():.3f} and variance {noise.var():.3f}, expected 0 and 1"]
    return []


def move_faults(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], rate: float) -> list[str]:
    """Return what is wrong with a step: weights must move no further than Adam can move them, and averages must follow.

    Args:
        before, after: copies of a parameter and of its average, before and after the step.
        rate: the learning rate; the largest move must exceed a tenth of it.
    """
    moved = (after[0].double() - before[0].double()).abs().max().item()
    # The bound does not include the rounding of the updated weights.
    bound = ADAM_STEPS * rate + 2.0**-23 * before[0].abs().max().item()
    faults = []
    if not rate / 10 < moved <= bound:
        faults.append(f"step: weights moved by up to {moved:.3e}, expected {rate / 10:.1e} to {bound:.1e}")
    if torch.equal(before[1], after[1]) or not bool(after[1].isfinite().all()):
        faults.append("step: the averaged weights did not follow")
    return faults


def _candidates(data: ImageSet, label: int | None, null: int, seen: set[int]) -> list[int]:
    """Return the indices of the unused images that a batch's image may come from.

    These are those of its label, or all of them if the label was dropped.
    """
    fits = range(len(data)) if label is None or label == null else (data.labels == label).nonzero().flatten().tolist()
    return [i for i in fits if i not in seen]


def _recompute(model: PixelFlowTransformer) -> None:
    """Make each block keep only its inputs and recompute its forward pass in the backward pass."""
    for block in model.transformer_blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)


def _times(error: float, allowed: float) -> float:
    """Return an error as a multiple of its bound; infinite for NaN or a bound of 0."""
    return error / allowed if allowed > 0 and not math.isnan(error) else math.inf


def _largest(values: Tensor) -> float:
    return values.double().abs().max().item()


def _length(values: Tensor) -> float:
    return values.double().square().sum().sqrt().item()

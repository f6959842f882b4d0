"""Plans of training steps: what each image of a step is made of, as CPU tensors.

A plan is a pure function of the recipe, the step and the size of the data set. A position is the number of samples
consumed before; step i covers the positions ``i * batch_size`` to ``(i + 1) * batch_size - 1``. What is drawn for a
position depends on the seed and the position; its stage, which must balance, on the seed and the step. Therefore the
number of workers, the number of ranks and the other images do not affect what a sample gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainConfig
from .draws import (
    Purpose,
    as_integers,
    as_seeds,
    as_uniforms,
    balanced_stages,
    integers,
    new_seed,
    sample_ids,
    seeds,
    words_for,
)

_WORDS = {
    Purpose.TIME: 2,
    Purpose.LABEL_DROP: 2,
    Purpose.FLIP: 2,
    Purpose.AFFINE: 8,
    Purpose.CROP: 4,
    Purpose.NOISE: 2,
}
"""Random words that an image of a step needs besides its stage, two for each number."""


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The images of a step, or of a rank's share of it, in the order of the pack.

    Full resolution comes first; images of one stage are in the order of their positions.

    Attributes:
        position: ``[n]`` int64, samples consumed before this one.
        sample: ``[n]`` int64, index into the data set.
        stage: ``[n]`` int64.
        time: ``[n]`` int64, the step k of the stage's training grid.
        drop: ``[n]`` bool, whether the label is replaced by the null class.
        flip: ``[n]`` bool, whether the image is mirrored left to right.
        affine: ``[n, 4]`` float64 in [-1, 1), as fractions of their limits: rotation, scale, shift across, shift down.
        crop: ``[n, 2]`` float64 in (0, 1], the place of the square within the image, across and down; see
            :func:`~.data.crop.offset`.
        noise_seed: ``[n]`` int64, 64 random bits.
    """

    position: Tensor
    sample: Tensor
    stage: Tensor
    time: Tensor
    drop: Tensor
    flip: Tensor
    affine: Tensor
    crop: Tensor
    noise_seed: Tensor

    def __len__(self) -> int:
        return self.position.shape[0]


def plan_step(config: TrainConfig, step: int, dataset_size: int, rank: int = 0, world_size: int = 1) -> Plan:
    """Plan a step, or a rank's share of it.

    Args:
        config: the recipe.
        step: from 0.
        dataset_size: number of samples.
        rank: whose share, from 0.
        world_size: number of shares. Together they make up the step, whatever their number. Their sizes differ by at
            most one, and so do their counts of each stage.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    if step < 0:
        raise ValueError(f"step: got {step}, expected 0 or more")
    if dataset_size < 1:
        raise ValueError(f"dataset_size: got {dataset_size}, expected 1 or more")
    seed, count = config.seed, config.batch_size
    stage, mine = _share(seed, step, count, config.scheduler.num_stages, rank, world_size)
    position = step * count + mine
    drawn = words_for(seed, _WORDS, position)
    return Plan(
        position=position,
        sample=sample_ids(seed, position, dataset_size),
        stage=stage,
        time=as_integers(drawn[Purpose.TIME], config.scheduler.num_train_timesteps),
        drop=as_uniforms(drawn[Purpose.LABEL_DROP])[:, 0] < config.label_drop,
        flip=(as_uniforms(drawn[Purpose.FLIP])[:, 0] < 0.5) & config.data.augment.flip,
        affine=2 * as_uniforms(drawn[Purpose.AFFINE]) - 1,
        crop=1 - as_uniforms(drawn[Purpose.CROP]),
        noise_seed=as_seeds(drawn[Purpose.NOISE]),
    )


def token_sides(config: TrainConfig, first: int, count: int) -> list[int]:
    """Return rows (= columns) of tokens of each image at ``count`` positions from ``first``, in descending order.

    The positions must share a step, which has as many images of each stage as its positions have remainders modulo the
    number of stages.
    """
    num_stages = config.scheduler.num_stages
    stages = sorted((position % num_stages for position in range(first, first + count)), reverse=True)
    return [(config.resolution >> (num_stages - 1 - stage)) // config.model.patch_size for stage in stages]


def token_lengths(config: TrainConfig, first: int, count: int) -> list[int]:
    """Return the number of tokens of each image at ``count`` positions from ``first``, see :func:`token_sides`."""
    return [side * side for side in token_sides(config, first, count)]


def parts_of_step(config: TrainConfig, step: int, world_size: int = 1) -> int:
    """Return the number of parts in which each rank computes a step to stay within ``compute.max_tokens`` per pack.

    Ranks exchange gradients part by part, so all have the same number of parts, which may be more than some of them
    need.
    """
    lengths = token_lengths(config, step * config.batch_size, config.batch_size)
    return _parts_within(config.compute.max_tokens, lengths, 1, world_size)


def parts_of_held_out(config: TrainConfig, dataset_size: int, world_size: int = 1) -> int:
    """Return the number of parts in which each rank evaluates the held-out images.

    A part has at most ``batch_size`` images and ``compute.max_tokens`` tokens.
    """
    lengths = token_lengths(config, 0, dataset_size)
    return _parts_within(config.compute.max_tokens, lengths, math.ceil(dataset_size / config.batch_size), world_size)


def _parts_within(most: int | None, lengths: list[int], least: int, world_size: int) -> int:
    """Return the smallest number of parts, from ``least`` on, that keeps every pack within the budget ``most``.

    The lengths must be in descending order.
    """
    count = least
    # The first part of rank 0 is the largest: lengths descend, and images are dealt out round-robin.
    while most is not None and sum(lengths[:: count * world_size]) > most:
        count += 1
    return count


def plan_held_out(config: TrainConfig, dataset_size: int, rank: int = 0, world_size: int = 1) -> Plan:
    """Plan the evaluation of all held-out images, or of a share of them: each once, with its label.

    Images are cropped in the middle and not augmented. Stages, times and noise are drawn with a seed of their own, are
    the same in every evaluation and do not depend on the batch size.

    Args:
        config: the recipe.
        dataset_size: number of held-out images.
        rank, world_size: see :func:`plan_step`.
    """
    seed = new_seed(config.seed, Purpose.HELD_OUT)
    stage, position = _share(seed, 0, dataset_size, config.scheduler.num_stages, rank, world_size)
    count = len(position)
    return Plan(
        position=position,
        sample=position,
        stage=stage,
        time=integers(seed, Purpose.TIME, position, config.scheduler.num_train_timesteps),
        drop=torch.zeros(count, dtype=torch.bool),
        flip=torch.zeros(count, dtype=torch.bool),
        affine=torch.zeros(count, 4, dtype=torch.float64),
        crop=torch.full((count, 2), 0.5, dtype=torch.float64),
        noise_seed=seeds(seed, Purpose.NOISE, position),
    )


def _share(seed: int, step: int, count: int, num_stages: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Return stages ``[n]`` and places in the step ``[n]`` of a rank's images.

    The images are sorted by stage, full resolution first, and dealt out round-robin.
    """
    if not 1 <= world_size <= count:
        raise ValueError(f"world_size: got {world_size}, expected 1 to {count}: an image for every rank")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, expected 0 to {world_size - 1}")
    stages = balanced_stages(seed, step, count, num_stages)
    mine = stages.argsort(descending=True, stable=True)[rank::world_size]
    return stages[mine], mine

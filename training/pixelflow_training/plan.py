"""What each image of a step is made of: pure functions of the recipe and the step, in plain tensors on the CPU.

Step i covers the positions ``i * batch_size`` to ``(i + 1) * batch_size - 1``, samples consumed since the run began.
What is drawn for a position depends on the seed and the position; its stage, which must balance, on the seed and the
step. So neither the number of workers, nor that of ranks, nor an image's mates change what a sample gets.
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
"""What an image of a step needs beside its stage, two words a number."""


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """The images of a step, or of a rank's share of it, in the order of the pack.

    Full resolution comes first; images of one stage are in the order of their positions.

    Attributes:
        position: ``[n]`` int64, samples consumed before this one.
        sample: ``[n]`` int64, which sample of the data set.
        stage: ``[n]`` int64.
        time: ``[n]`` int64, the step k of the stage's training grid.
        drop: ``[n]`` bool, whether the label is replaced by the null class.
        flip: ``[n]`` bool, whether the image is mirrored left to right.
        affine: ``[n, 4]`` float64 from -1 to below 1, as fractions of their limits: turn, size, moves across and down.
        crop: ``[n, 2]`` float64 above 0 to 1: where in the room beside it the square is cut out, across and down.
        noise_seed: ``[n]`` int64, 64 bits.
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
        world_size: number of shares. Together they are the step, whatever their number. Their sizes differ by at most
            one, and so do their counts of each stage.

    Raises:
        ValueError: a number is out of range; the message names it.
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
    """Rows of tokens, and columns, of each image of the positions ``first`` to ``first + count - 1``; descending.

    Positions that share a step have as many images of each stage as they have remainders modulo the number of stages.
    """
    num_stages = config.scheduler.num_stages
    stages = sorted((position % num_stages for position in range(first, first + count)), reverse=True)
    return [(config.resolution >> (num_stages - 1 - stage)) // config.model.patch_size for stage in stages]


def token_lengths(config: TrainConfig, first: int, count: int) -> list[int]:
    """Tokens of each image of the positions ``first`` to ``first + count - 1``, which share a step; descending."""
    return [side * side for side in token_sides(config, first, count)]


def parts_of_step(config: TrainConfig, step: int, world_size: int = 1) -> int:
    """In how many parts each rank computes a step, so that no pack has more than ``compute.max_tokens`` tokens.

    Ranks exchange gradients part by part, so all have the same number, which may be more than some of them need.
    """
    lengths = token_lengths(config, step * config.batch_size, config.batch_size)
    return _parts_within(config.compute.max_tokens, lengths, 1, world_size)


def parts_of_held_out(config: TrainConfig, dataset_size: int, world_size: int = 1) -> int:
    """In how many parts each rank evaluates held-out images: packs of a batch and of ``compute.max_tokens`` at most."""
    lengths = token_lengths(config, 0, dataset_size)
    return _parts_within(config.compute.max_tokens, lengths, math.ceil(dataset_size / config.batch_size), world_size)


def _parts_within(most: int | None, lengths: list[int], least: int, world_size: int) -> int:
    """The smallest number of parts from ``least`` on that keeps packs of descending lengths within a budget."""
    count = least
    # The first part of the first rank has the largest images: sizes descend, and images are dealt out one by one.
    while most is not None and sum(lengths[:: count * world_size]) > most:
        count += 1
    return count


def plan_held_out(config: TrainConfig, dataset_size: int, rank: int = 0, world_size: int = 1) -> Plan:
    """Plan an evaluation of all held-out images, or a share of it: each once, its middle, unchanged, with its label.

    Stages, times and noise are drawn once for all, by a seed of their own, and do not depend on the batch size.

    Args:
        config: the recipe.
        dataset_size: number of held-out images.
        rank, world_size: as in :func:`plan_step`.
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
    """Stages ``[n]`` and places in the step ``[n]`` of a rank's images: all images by stage, dealt out one by one."""
    if not 1 <= world_size <= count:
        raise ValueError(f"world_size: got {world_size}, expected 1 to {count}: an image for every rank")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank}, expected 0 to {world_size - 1}")
    stages = balanced_stages(seed, step, count, num_stages)
    mine = stages.argsort(descending=True, stable=True)[rank::world_size]
    return stages[mine], mine

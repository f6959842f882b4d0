"""The parts of a plain training loop of the published shape for the reference model, written from its description.

Training pairs are built where the data are loaded, stage by stage. Values per image are Python lists. Each block
spreads the modulations of an image over its tokens by concatenating a piece per image. Losses are split by image, and
averages are updated parameter by parameter. Attention of a pack is one call if FlashAttention is available, otherwise
one call per image size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelflow_engine import PixelFlowConfig
from pixelflow_engine.reference import PixelFlowTransformer, make_stages
from pixelflow_engine.reference.model import (
    Attention,
    TransformerBlock,
    at_least_fp32,
    layer_norm,
    patchify,
    rotary_angles,
)
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.varlen_attention import backends as attention_backends
from pixelflow_kernels.varlen_attention import varlen_attention
from pixelflow_training.collate import Batch
from pixelflow_training.data import ImageSet
from pixelflow_training.draws import sample_ids

from .problem import SEED, TrainingProblem

Example = tuple[Tensor, int]
"""An image ``[c, R, R]`` in [-1, 1], and its label."""


class Loader:
    """Makes batches from single images, in the order in which the other loops see them.

    Args:
        problem: the training problem, which sets the size of a batch.
        data: decoded images.
    """

    def __init__(self, problem: TrainingProblem, data: ImageSet) -> None:
        self.problem, self.data = problem, data
        self.stages = make_stages(problem.config.scheduler.num_stages)
        self.python = random.Random(SEED)
        self.torch = torch.Generator().manual_seed(SEED)

    def examples(self, step: int) -> list[Example]:
        """Return the examples of a step's batch."""
        ids = sample_ids(SEED, self.problem.positions(step), len(self.data)).tolist()
        return [(self.data.images[i].float().div(255).sub(0.5).div(0.5), int(self.data.labels[i])) for i in ids]

    def batch(self, step: int) -> ListedBatch:
        """Draw stages, times, noise and label drops for a step's images, and pack the training pairs."""
        config, stages, examples = self.problem.config, self.stages, self.examples(step)
        p, drop, null = config.model.patch_size, self.problem.recipe.label_drop, config.model.num_classes
        images = torch.stack([image for image, _ in examples])
        given = [null if self.python.random() < drop else label for _, label in examples]
        assigned = [stage.index for stage in stages] * (len(examples) // len(stages))
        self.python.shuffle(assigned)
        steps = torch.randint(0, config.scheduler.num_train_timesteps, (len(examples),), generator=self.torch)

        tokens, targets, t_model, rotary = [], [], [], []
        labels: list[int] = []
        lengths: list[int] = []
        indices: list[int] = []
        for stage in reversed(stages):
            chosen = [i for i, index in enumerate(assigned) if index == stage.index]
            sharp = coarse = images[chosen]
            for _ in range(len(stages) - 1 - stage.index):
                sharp = F.interpolate(sharp, scale_factor=0.5, mode="bilinear", align_corners=False)
            for _ in range(len(stages) - stage.index):
                coarse = F.interpolate(coarse, scale_factor=0.5, mode="bilinear", align_corners=False)
            coarse = F.interpolate(coarse, scale_factor=2, mode="nearest")
            eps = torch.randn(sharp.shape, generator=self.torch)
            end = stage.end * sharp + (1 - stage.end) * eps
            start = stage.start * coarse + (1 - stage.start) * eps
            tau = stage.local_times[steps[chosen]].float()[:, None, None, None]
            tokens.append(patchify(tau * end + (1 - tau) * start, p).flatten(0, 1))
            targets.append(patchify(end - start, p).flatten(0, 1))
            t_model.append(stage.model_times[steps[chosen]].float())
            side = sharp.shape[3] // p
            rotary.extend([rotary_table(side, config.model.attention_head_dim)] * len(chosen))
            lengths.extend([side * side] * len(chosen))
            labels.extend(given[i] for i in chosen)
            indices.extend([stage.index] * len(chosen))
        return ListedBatch(
            tokens=torch.cat(tokens),
            targets=torch.cat(targets),
            rotary=torch.cat([torch.stack(table, dim=-1) for table in rotary]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            t_model=torch.cat(t_model),
            sizes=torch.tensor([int(length**0.5) for length in lengths], dtype=torch.int32),
            labels=labels,
            lengths=lengths,
            stages=indices,
        )


@dataclass(frozen=True, eq=False, slots=True)
class ListedBatch:
    """A pack, with images of full resolution first.

    Attributes:
        tokens, targets: ``[T, c * p * p]``, patches in (channel, row, column) order.
        rotary: cosines and sines for every token's position, ``[T, D / 2, 2]``.
        cu_seqlens: cumulative sequence lengths, ``[n + 1]`` int32.
        t_model: model times, ``[n]``.
        sizes: widths in tokens, ``[n]``; int32 as :class:`Loader` makes them.
        labels, lengths, stages: class label, number of tokens and stage of each image.
    """

    tokens: Tensor
    targets: Tensor
    rotary: Tensor
    cu_seqlens: Tensor
    t_model: Tensor
    sizes: Tensor
    labels: list[int]
    lengths: list[int]
    stages: list[int]

    def to(self, device: torch.device) -> ListedBatch:
        """Return the batch with its tensors on a device."""
        names = ("tokens", "targets", "rotary", "cu_seqlens", "t_model", "sizes")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def as_batch(self, config: PixelFlowConfig) -> Batch:
        """Return the batch in the form in which batches are checked."""
        return Batch(
            tokens=self.tokens,
            targets=self.targets,
            layout=PackedLayout.from_grids([(side, side) for side in self.sizes.tolist()]),
            t_model=self.t_model,
            labels=torch.tensor(self.labels) if config.model.num_classes > 0 else None,
            latent_size=self.sizes,
            stage=torch.tensor(self.stages),
        )


def listed(batch: Batch, config: PixelFlowConfig) -> ListedBatch:
    """Return a given batch in the form of this loop."""
    sides = [rows for rows, _ in batch.layout.grids]
    tables = [rotary_table(side, config.model.attention_head_dim) for side in sides]
    return ListedBatch(
        tokens=batch.tokens,
        targets=batch.targets,
        rotary=torch.cat([torch.stack(table, dim=-1) for table in tables]),
        cu_seqlens=batch.layout.cu_seqlens,
        t_model=batch.t_model,
        sizes=batch.latent_size,
        labels=[] if batch.labels is None else batch.labels.tolist(),
        lengths=[side * side for side in sides],
        stages=batch.stage.tolist(),
    )


def rotary_table(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for the positions of a square image, ``[N, D / 2]`` each."""
    angles = rotary_angles(side, side, head_dim, "cpu")
    return angles.cos(), angles.sin()


def packed_velocities(model: PixelFlowTransformer, batch: ListedBatch) -> Tensor:
    """Compute the reference's velocities of a pack's tokens, ``[T, c * p * p]`` in (channel, row, column) order."""
    patch, lengths = model.patch_embed.proj, batch.lengths
    labels = torch.tensor(batch.labels, device=batch.tokens.device) if model.num_classes > 0 else None
    x = F.linear(batch.tokens, patch.weight.flatten(1), patch.bias)
    c = model.conditioning(batch.t_model, batch.sizes, labels)
    for block in model.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        x = _block(block, x, c, batch)
    shift, scale = _spread(model.proj_out_1(F.silu(c)), lengths).chunk(2, dim=-1)
    x = model.proj_out_2(_modulate(layer_norm(x), shift, scale))
    p = model.patch_size
    return x.unflatten(-1, (p, p, -1)).permute(0, 3, 1, 2).flatten(1)


def image_losses(velocities: Tensor, batch: ListedBatch) -> list[Tensor]:
    """Compute the mean squared error of each image, one by one."""
    squares = (velocities.float() - batch.targets.float()) ** 2
    return [part.mean() for part in torch.split(squares, batch.lengths)]


@torch.no_grad()
def update_ema(ema: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the averages towards a model's weights, parameter by parameter."""
    for name, parameter in model.named_parameters():
        ema[name].mul_(decay).add_(parameter, alpha=1 - decay)


def _block(block: TransformerBlock, x: Tensor, c: Tensor, batch: ListedBatch) -> Tensor:
    rows = _spread(block.norm1.linear(F.silu(c)), batch.lengths)
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, dim=-1)
    y = _attention(block.attn1, _modulate(layer_norm(x), shift1, scale1).to(x.dtype), batch)
    x = x + (gate1 * y.to(gate1.dtype)).to(y.dtype)
    y = block.mlp(_modulate(block.norm3(x), shift2, scale2))
    return x + (gate2 * y.to(gate2.dtype)).to(y.dtype)


def _spread(rows: Tensor, lengths: list[int]) -> Tensor:
    """Repeat the rows ``[n, k]`` of images for their tokens, ``[T, k]`` in at least float32, a piece per image."""
    pieces = [row[None].expand(length, -1) for row, length in zip(rows, lengths, strict=True)]
    return torch.cat(pieces).to(at_least_fp32(rows.dtype))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x.to(scale.dtype) * (1 + scale) + shift).to(x.dtype)


def _attention(attention: Attention, u: Tensor, batch: ListedBatch) -> Tensor:
    heads = attention.heads
    q = _rotate(attention.q_norm(attention.q_proj(u)).unflatten(-1, (heads, -1)), batch.rotary)
    k = _rotate(attention.k_norm(attention.k_proj(u)).unflatten(-1, (heads, -1)), batch.rotary)
    v = attention.v_proj(u).unflatten(-1, (heads, -1))
    if attention_backends.why_not("flash", q.device, q.dtype) is None:
        longest = max(batch.lengths)
        out = varlen_attention(q, k, v, batch.cu_seqlens, batch.cu_seqlens, longest, longest, backend="flash")
    else:
        out = _attention_by_size(q, k, v, batch.lengths)
    return attention.o_proj(out.flatten(-2))


def _attention_by_size(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    groups = [(length, len(list(group))) for length, group in groupby(lengths)]
    totals = [length * count for length, count in groups]
    out = []
    for (length, _), *parts in zip(groups, *(x.split(totals) for x in (q, k, v)), strict=True):
        batched = [part.unflatten(0, (-1, length)).transpose(1, 2) for part in parts]
        out.append(F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels of ``x [T, H, D]``, in at least float32."""
    cos, sin = (part[:, None] for part in rotary.unbind(-1))
    a, b = x.to(at_least_fp32(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)

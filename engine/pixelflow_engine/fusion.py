"""Concatenate weights that multiply the same input, so that one product replaces several.

The parameters keep their names, shapes and values: they become views of the wider tensors, so the state dict is
unchanged. A wider product may round differently, so the exact path does not use this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import PackedTransformer
from .operations import SideBySide


@torch.no_grad()
def fuse(model: PackedTransformer) -> None:
    """Concatenate the weights of a model for sampling, in place.

    This covers queries, keys and values of each self-attention; the modulations of all blocks and of the head; and a
    second patch embedding whose input is in the order of the head's output, so that a state can stay in that order
    between steps. Values copied into the parameters later (by ``load_state_dict``, but not with ``assign=True``) take
    effect: the views share them, and :func:`follow_weights` updates the second patch embedding.

    Args:
        model: a model without gradients, already on its device and in its dtype.
    """
    for block in model.blocks:
        block.attn1.qkv = side_by_side(block.attn1.q_proj, block.attn1.k_proj, block.attn1.v_proj)
    linears = [block.norm1.linear for block in model.blocks]
    model.all_modulations = side_by_side(*linears, model.proj_out_1)
    patch = model.patch_embed.proj
    with torch.inference_mode(False):  # not an inference tensor: it is written to later
        by_pixel = _by_pixel(patch.weight).clone(memory_format=torch.contiguous_format)
    model.patch_embed.by_pixel = SideBySide(by_pixel, patch.bias)


@torch.no_grad()
def follow_weights(model: PackedTransformer) -> None:
    """Update a fused model's copied weights from its parameters, which may have been reloaded, in place.

    The second patch embedding is the only copy, and its tensor stays at the same address. Everything else is a view.
    """
    if model.patch_embed.by_pixel is not None:
        model.patch_embed.by_pixel.weight.copy_(_by_pixel(model.patch_embed.proj.weight))


def _by_pixel(weight: Tensor) -> Tensor:
    """``[C, c, p, p] -> [C, p * p * c]``."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def side_by_side(*linears: nn.Linear) -> SideBySide:
    """Concatenate linear layers into one product; their parameters become views of its tensors."""
    weights: list[Tensor] = [linear.weight for linear in linears]
    weight = torch.cat(weights)
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    sizes = [linear.out_features for linear in linears]
    for linear, rows in zip(linears, weight.split(sizes), strict=True):
        linear.weight = nn.Parameter(rows, requires_grad=False)
    if bias is not None:
        for linear, part in zip(linears, bias.split(sizes), strict=True):
            linear.bias = nn.Parameter(part, requires_grad=False)
    return SideBySide(weight, bias)

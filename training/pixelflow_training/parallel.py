"""Weights on several ranks: a copy on each, one spread over all, or both, by PyTorch's own means."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pixelflow_engine.model import PackedTransformer

from .config import ComputeConfig
from .ranks import Ranks


def shard(trained: PackedTransformer, averaged: PackedTransformer, compute: ComputeConfig, ranks: Ranks) -> None:
    """Spread the weights of a model and of its average over ranks, in place, where the recipe says so.

    A part of a model is gathered while it computes, in the recipe's type, of the average in float32, as one process
    evaluates it; gradients are added up in float32. The parts are the blocks, and their modulations, which are computed
    for all blocks at once.
    """
    if compute.shard == 1:
        return
    sizes = (ranks.world_size // compute.shard, compute.shard)
    mesh = init_device_mesh(ranks.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    if sizes[0] == 1:
        mesh = mesh["shard"]
    # Blocks return views, and nothing is computed in place on what they return.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    for model, dtype in ((trained, getattr(torch, compute.dtype)), (averaged, torch.float32)):
        # Inputs stay as they are: modulations are float32 in any model.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block.norm1, mesh=mesh, mp_policy=policy)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has spread it."""
    return isinstance(model, FSDPModule)


def exchanging(model: PackedTransformer, ranks: Ranks) -> nn.Module:
    """A model whose backward pass leaves the mean over ranks of the gradients, exchanged while it goes on."""
    if ranks.alone or is_sharded(model):
        return model
    ids = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; all ranks must ask for it."""
    return cast("Tensor", tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor  # type: ignore[redundant-cast]


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the memory where it lies."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

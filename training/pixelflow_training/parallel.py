"""Weights on several ranks: a copy on each, one spread over all, or both, by PyTorch's own means."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pixelflow_engine.model import PackedTransformer
from pixelflow_kernels import PackedLayout

from .config import ComputeConfig, TrainConfig
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


def exchanging(model: PackedTransformer, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """A model whose backward pass leaves the mean over ranks of the gradients, exchanged while it goes on.

    The order in which ranks' gradients add up is that of every step to come, in any process that trains by the recipe.
    """
    if ranks.alone or is_sharded(model):
        return model
    ids = [ranks.device] if ranks.device.type == "cuda" else None
    exchanged = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    _rehearse(exchanged, config, ranks.device)
    return exchanged


def _rehearse(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """One backward pass of an image that is always the same, of which nothing is kept.

    PyTorch lays its buckets of gradients out anew after the first backward pass, in the order in which gradients came.
    Three ranks or more add up an element in an order that depends on its place in a bucket, so the first step of a
    process would round otherwise than the same step of a run that was not stopped before it.
    """
    network = config.network
    side = (network.resolution >> (network.scheduler.num_stages - 1)) // network.model.patch_size
    tokens = torch.zeros(side * side, network.model.in_channels * network.model.patch_size**2, device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    # Uncompiled: no step has this pack, and a graph of it would serve nothing.
    with torch.compiler.set_stance("force_eager") if config.compute.compile else nullcontext():
        velocities = model(
            tokens,
            torch.zeros(1, device=device),
            PackedLayout.from_grids([(side, side)], device),
            number + side,
            number if network.model.num_classes else None,
        )
        velocities.sum().backward()
    model.zero_grad(set_to_none=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; all ranks must ask for it."""
    return cast("Tensor", tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor  # type: ignore[redundant-cast]


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the memory where it lies."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

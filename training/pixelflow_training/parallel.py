"""Weights on several ranks: replicated, sharded or both, by PyTorch's DistributedDataParallel and fully_shard."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    """Shard the weights of a model and of its average over ranks, in place, if ``compute.shard`` is above 1.

    Each unit is gathered while it computes: the trained model's in the recipe's type, the average's in float32, the
    type in which a single process evaluates it. Gradients are reduced in float32. The units are the blocks, the rest of
    the model and, separately, the blocks' modulations, which are computed for all blocks at once.
    """
    if compute.shard == 1:
        return
    sizes = (ranks.world_size // compute.shard, compute.shard)
    mesh = init_device_mesh(ranks.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    if sizes[0] == 1:
        mesh = mesh["shard"]
    for model, dtype in ((trained, getattr(torch, compute.dtype)), (averaged, torch.float32)):
        # Inputs are not cast: modulations are float32 in every model.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block.norm1, mesh=mesh, mp_policy=policy)
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def views_allowed() -> Iterator[None]:
    """Context of a run in which PyTorch does not warn of sharded blocks that return views.

    Nothing modifies these views in place. The context is that of a run, not of a step, because warning filters are
    global to the process: setting and resetting them in every step could race with other threads.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning
        )
        yield


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` has sharded the model."""
    return isinstance(model, FSDPModule)


def exchanging(model: PackedTransformer, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """Wrap a model so that its backward pass averages gradients over ranks, overlapped with the computation.

    Sharded models do so already, and a process without others needs no exchange; these are returned unchanged. The
    order in which ranks' gradients are added up is the same in every step, in every process that trains by the recipe.
    """
    if ranks.alone or is_sharded(model):
        return model
    ids = [ranks.device] if ranks.device.type == "cuda" else None
    exchanged = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    _rehearse(exchanged, config, ranks.device)
    return exchanged


def _rehearse(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Run one backward pass of a fixed image and discard the result.

    DistributedDataParallel rebuilds its gradient buckets after the first backward pass, in the order in which gradients
    became ready. With three ranks or more, the order in which an element is summed depends on its place in a bucket.
    Without this pass, the first step of a process would round differently from the same step of a run that was not
    stopped before it.
    """
    network = config.network
    side = (network.resolution >> (network.scheduler.num_stages - 1)) // network.model.patch_size
    tokens = torch.zeros(side * side, network.model.in_channels * network.model.patch_size**2, device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    # Uncompiled: no step has this pack, so a compiled graph of it would be useless.
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
    """Return the unsharded tensor; for a sharded one a collective operation, which all ranks must call."""
    return cast("Tensor", tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor  # type: ignore[redundant-cast]


def mine(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

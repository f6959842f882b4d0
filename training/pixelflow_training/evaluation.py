"""Evaluation of the averaged model on held-out images, and its export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from pixelflow_engine.backends import choose
from pixelflow_engine.checkpoint import save_checkpoint
from pixelflow_engine.errors import BackendUnavailableError
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.operations import Operations, PlainOperations

from .collate import Batch, make_batch
from .config import TrainConfig
from .data import TrainingImages
from .parallel import whole
from .plan import parts_of_held_out, plan_held_out
from .ranks import ALONE, Ranks
from .run import RunDirectory
from .state import TrainState
from .step import batch_losses, stage_means, stage_sums

NOT_COUNTED = -1
"""Stage of an image that a rank evaluates only to take part in collective operations."""


def held_out_batches(config: TrainConfig, data: TrainingImages, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield every held-out image once, or a rank's share, with random draws that are the same in every evaluation.

    A batch has at most ``batch_size`` images and ``compute.max_tokens`` tokens. All ranks have the same number of
    batches, because sharded weights are gathered in each; a rank that has run out of images gets a share that is not
    counted.
    """
    parts = parts_of_held_out(config, len(data), world_size)
    shares = min(parts * world_size, len(data))
    for share in range(rank, parts * world_size, world_size):
        plan = plan_held_out(config, len(data), min(share, shares - 1), shares)
        taken = data.take(plan)
        batch = replace(make_batch(taken.images, taken.labels, plan, config.network), skipped=taken.skipped)
        yield batch if share < shares else replace(batch, stage=torch.full_like(batch.stage, NOT_COUNTED))


@torch.no_grad()
def held_out_loss(
    model: PackedTransformer, batches: Sequence[Batch], num_stages: int, ranks: Ranks = ALONE
) -> list[float | None]:
    """Return the mean loss of each stage over the held-out images of all ranks; None for a stage without images.

    The model's device has one batch at a time.
    """
    losses = torch.cat([batch_losses(model, batch.to(model.device)) for batch in batches]).tolist()
    stages = torch.cat([batch.stage for batch in batches]).tolist()
    return stage_means(ranks.total(stage_sums(losses, stages, num_stages)))


def evaluating_operations(config: TrainConfig, device: torch.device) -> Operations:
    """Return the uncompiled operations of the recipe's backend, or plain ones if it does not support float32.

    The averages are float32.
    """
    try:
        backend = choose(config.compute.backend, device, torch.float32, config.model.attention_head_dim)
    except BackendUnavailableError:
        return PlainOperations()
    return backend.operations(compiled=False)


def averaged_weights(state: TrainState, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gather the averaged weights in rank 0's CPU memory, under the published names; the other ranks return none.

    A collective operation: all ranks must call it. One tensor is gathered at a time, so that a device with memory for
    only its share of the model suffices.
    """
    gathered = ((name, whole(tensor)) for name, tensor in state.ema.model.state_dict().items())
    return {name: tensor.cpu() for name, tensor in gathered if ranks.first}


def export(run: RunDirectory, state: TrainState, config: TrainConfig, ranks: Ranks) -> None:
    """Write the averaged model in the form that every command accepts; all ranks must call it."""
    tensors = averaged_weights(state, ranks)
    ranks.first_does(lambda: save_checkpoint(run.model, config.network, tensors, overwrite=True))

"""The processes (ranks) of a run: a single process, or those that torchrun has started."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pixelflow_engine.arguments import automatic, place
from pixelflow_engine.errors import ConfigError

from .config import TrainConfig

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""Timeout of a collective operation within a step."""

ERRAND = timedelta(hours=2)
"""Timeout while rank 0 does something for all ranks, or a checkpoint is written, which takes as long as the disk does.

A rank that ends meanwhile is still noticed at once, because its connections close.
"""

FAILED_EXCHANGE = re.compile(r"\bgloo/[\w/]+\.(cc|h):\d+\]|\bNCCL (error|communicator)\b")


class RankLostError(ConnectionError):
    """Another rank has ended or cannot be reached."""


@dataclass(frozen=True, eq=False, slots=True)
class Ranks:
    """The group of processes that train together, and the place of this one in it.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: device on which this process computes.
        control: process group for agreement between ranks within a step; None without a process group.
        errands: process group in which rank 0 broadcasts the result of what it does for all.
        saving: process group in which a background thread writes checkpoints.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    errands: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no process group, because there is one process."""
        return self.control is None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once: log, model, digests."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Return sums over all ranks, in float64; every rank gets the same bits."""
        if self.alone:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def together(self, items: Sequence[T]) -> list[T]:
        """Return the items of all ranks in the order of ranks. Without any items only their number is exchanged."""
        if self.alone or not any(self.total([len(items)])):
            return list(items)
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, list(items), group=self.control)
        return [item for part in found for item in part]

    def first_does(self, what: Callable[[], T]) -> T:
        """Call ``what`` on rank 0 alone; all ranks return its result or raise its exception."""
        if self.alone:
            return what()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = what()
            except Exception as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, group=self.errands)
        if said[1] is not None:
            raise said[1]
        found: T = said[0]
        return found


ALONE = Ranks(0, 1, torch.device("cpu"))
"""A single process on the CPU, without a process group."""


@contextmanager
def join(config: TrainConfig) -> Iterator[Ranks]:
    """Join the process group if torchrun has started several processes; leave it at the end of the context.

    One process is alone however it was started: it exchanges nothing.

    Raises:
        ConfigError: ``batch_size`` is smaller than the number of ranks, ``compute.shard`` does not divide that number,
            or ``compute.device`` names one GPU for several ranks.
        ValueError: there is no such device.
        RankLostError: communication with the other ranks has failed within the context.
    """
    named, shard = automatic(config.compute.device), config.compute.shard
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        if shard > 1:
            raise ConfigError(f"compute.shard: got {shard}, but there is one process; torchrun starts more")
        yield Ranks(0, 1, numbered(place(named)))
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size > config.batch_size:
        raise ConfigError(f"batch_size: got {config.batch_size}, expected at least {world_size}, an image a rank")
    if world_size % shard:
        raise ConfigError(f"compute.shard: got {shard}, expected a divisor of {world_size}, the number of ranks")
    device = numbered(place(of_this_rank(named)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        waits = PATIENCE, ERRAND, ERRAND
        control, errands, saving = (dist.new_group(backend="gloo", timeout=wait) for wait in waits)
        yield Ranks(rank, world_size, device, control, errands, saving)
    except RuntimeError as error:
        if not is_of_an_exchange(error):
            raise
        raise RankLostError(
            f"rank {rank}: another of the {world_size} ranks has ended or does not answer; the same command resumes "
            f"from the last checkpoint ({error})"
        ) from error
    finally:
        dist.destroy_process_group()


def numbered(device: torch.device) -> torch.device:
    """Add the current index to a ``cuda`` device.

    Tensors on ``cuda`` report ``cuda:0``, which does not compare equal to ``cuda``.
    """
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def of_this_rank(named: str) -> str:
    """Return the device of this rank: for ``cuda``, the GPU of the rank's number on this machine.

    Raises:
        ConfigError: one GPU is named for several ranks on this machine.
    """
    if named == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if named.startswith("cuda") and int(here) > 1:
        raise ConfigError(
            f"compute.device: got {named} for {here} ranks on this machine, expected cuda: each takes a GPU of its own"
        )
    return named


def is_of_an_exchange(error: RuntimeError) -> bool:
    """Whether communication with other ranks has failed.

    In a backward pass these errors are plain RuntimeErrors. They are told by their text: gloo's begin with a place in
    its source, NCCL's with its name.
    """
    return isinstance(error, dist.DistError) or FAILED_EXCHANGE.search(str(error)) is not None

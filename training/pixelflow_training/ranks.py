"""The processes of a run: this one alone, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pixelflow_engine.arguments import place
from pixelflow_engine.errors import ConfigError

from .config import TrainConfig

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others in one exchange before it gives up on them."""

ERRAND = timedelta(hours=2)
"""How long it waits while the first one does something for all, or a checkpoint is written: as long as the disk takes.
Whoever ends meanwhile is missed at once, by the connections to it."""


class RankLostError(ConnectionError):
    """Another rank has ended, or cannot be reached."""


@dataclass(frozen=True, eq=False, slots=True)
class Ranks:
    """Who takes part, and who this process is.

    Attributes:
        rank: this process's number, from 0.
        world_size: how many there are.
        device: where this one computes.
        control: the group in which ranks agree with each other; None for a process alone.
        errands: the group in which the first rank tells what it has done for all.
        saving: the group in which checkpoints are written meanwhile, by a thread of their own.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    errands: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def alone(self) -> bool:
        """There is no other."""
        return self.control is None

    @property
    def first(self) -> bool:
        """This process writes what is written once: log, model, digests."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64; the same bits on each."""
        if self.alone:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def together(self, items: Sequence[T]) -> list[T]:
        """The items of all ranks, one rank's after the other's; quick where there are none."""
        if self.alone or not any(self.total([len(items)])):
            return list(items)
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, list(items), group=self.control)
        return [item for part in found for item in part]

    def first_does(self, what: Callable[[], T]) -> T:
        """Have the first rank do something; all get what it returns, or what it raises."""
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
"""A process without others."""


@contextmanager
def join(config: TrainConfig) -> Iterator[Ranks]:
    """Meet the other ranks, if torchrun has started this process, and part from them at the end.

    Raises:
        ConfigError: ``batch_size`` has not an image for every rank, ``compute.shard`` does not divide their number, or
            ``compute.device`` names one GPU for several ranks.
        ValueError: there is no such device.
        RankLostError: an exchange with the other ranks inside ``with`` has failed.
    """
    named, shard = config.compute.device, config.compute.shard
    named = ("cuda" if torch.cuda.is_available() else "cpu") if named == "auto" else named
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
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
        if not _of_an_exchange(error):
            raise
        raise RankLostError(
            f"rank {rank}: another of the {world_size} ranks has ended or does not answer; the same command goes on "
            f"from the last checkpoint ({error})"
        ) from error
    finally:
        dist.destroy_process_group()


def numbered(device: torch.device) -> torch.device:
    """A GPU by its number: tensors on ``cuda`` say that they are on ``cuda:0``, which is not equal to it."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def of_this_rank(named: str) -> str:
    """The device of a rank: each has the GPU of its number on this machine."""
    if named == "cuda":
        return f"cuda:{os.environ['LOCAL_RANK']}"
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if named.startswith("cuda") and int(here) > 1:
        raise ConfigError(
            f"compute.device: got {named} for {here} ranks on this machine, expected cuda: each takes a GPU of its own"
        )
    return named


def _of_an_exchange(error: RuntimeError) -> bool:
    # Of a backward pass, gloo's errors come without a type of their own.
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))

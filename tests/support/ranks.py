"""Several training processes, as torchrun would start them, forked from a process that has imported torch already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pixelflow_training import loop
from pixelflow_training.ranks import RankLostError
from pixelflow_training.signals import EXIT_STOPPED, TrainingStopped
from support.recipes import tiny_recipe
from support.runs import PRELOADED, at_step, send

LOST, FAILED = 40, 41
"""Exit codes of a rank: another rank was lost; any other error, whose traceback is in ``rank-N.txt``."""

PORTS = range(20000, 32768)  # below the ports that Linux assigns by itself
PATIENCE = 300  # seconds after which a rank counts as hanging


def in_ranks(count: int, folder: Path, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run ``target(folder, *arguments)`` in ``count`` ranks (1: one process); return exit codes, -9 for SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    processes = [
        context.Process(target=_as_rank, args=(rank, count, port, folder, target, arguments)) for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    """Return a free port that the system will not assign to another process before the first rank uses it."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise OSError(f"none of 100 ports in {PORTS} is free")


def _as_rank(
    rank: int, count: int, port: int, folder: Path, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if count > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    try:
        target(folder, *arguments)
    except TrainingStopped:
        os._exit(EXIT_STOPPED)
    except BaseException as error:
        (folder / f"rank-{rank}.txt").write_text("".join(traceback.format_exception(error)))
        os._exit(LOST if isinstance(error, RankLostError) else FAILED)


def said(folder: Path, rank: int) -> str:
    """Return the error that a rank has written."""
    path = folder / f"rank-{rank}.txt"
    return path.read_text() if path.exists() else ""


def train(folder: Path, overrides: list[str]) -> None:
    """Train the tiny recipe; a target of :func:`in_ranks`."""
    loop.train(tiny_recipe(folder / os.environ["RANK"], *overrides), folder / "run", quiet=True)


def train_signalled(folder: Path, overrides: list[str], step: int, rank: int, number: signal.Signals) -> None:
    """Train, and send a signal to one rank when a step begins; a target of :func:`in_ranks`."""
    if int(os.environ["RANK"]) == rank:
        at_step(step, lambda: send(number))
    train(folder, overrides)

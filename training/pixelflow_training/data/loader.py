"""Images of the coming steps, read by other processes while this one trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import Plan, plan_step

from .source import Taken, TrainingImages

PATIENCE = 5.0
"""Seconds until a worker whose connection was cut has an exit code."""


class _Steps(Dataset[Taken]):
    """The images of a step, by its number; what a worker has of the run."""

    def __init__(self, data: TrainingImages, config: TrainConfig, rank: int, world_size: int) -> None:
        self.data = data
        self.share = rank, world_size
        self.config = config

    def __getitem__(self, step: int) -> Taken:
        return self.data.take(plan_step(self.config, step, len(self.data), *self.share))


class Loader:
    """The images of a run's steps in their order, the next ones made ahead by ``data.workers`` processes.

    With 0 workers they are made when they are asked for. The bits are the same: an image is a function of the plan.
    Workers are fresh processes, as a fork would copy the locks of this one's threads. They run inside ``with``.

    Args:
        data: where the images come from.
        config: the recipe.
        first_step: the first step that will be asked for, from 0; then one after the other up to ``steps``.
        rank, world_size: as in :func:`~pixelflow_training.plan.plan_step`.
        device: where the images are wanted.
    """

    def __init__(
        self,
        data: TrainingImages,
        config: TrainConfig,
        first_step: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.data = data
        self.device = torch.device(device)
        self._steps = _Steps(data, config, rank, world_size)
        self._next_step = first_step
        self._taken: Iterator[Taken] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> Loader:
        config = self._steps.config
        coming = range(self._next_step, config.steps)
        if not config.data.workers or not coming:
            return self
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=coming,
            num_workers=min(config.data.workers, len(coming)),
            collate_fn=_as_it_is,
            worker_init_fn=_end_with_the_parent,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the global one would move
            multiprocessing_context="spawn",
        )
        others = set(multiprocessing.active_children())
        with _undisturbed():
            self._taken = iter(loader)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken = None  # with which torch ends the workers, unless an error's trace still holds it
        for process in self._processes:
            process.kill()
            process.join()

    def __len__(self) -> int:
        return len(self.data)

    def listing(self) -> dict[str, str] | None:
        """That of ``data``."""
        return self.data.listing()

    def name(self, sample: int) -> str:
        """That of ``data``."""
        return self.data.name(sample)

    def take(self, plan: Plan) -> Taken:
        """The images of a plan, which must be that of the next step.

        Raises:
            ValueError: it is of another step.
            ChildProcessError: a worker has ended.
        """
        step = int(plan.position[0]) // self._steps.config.batch_size
        if step != self._next_step:
            raise ValueError(f"step: got {step}, expected {self._next_step}: a loader gives steps in their order")
        taken = self.data.take(plan) if self._taken is None else self._receive(self._taken)
        self._next_step += 1
        if self.device.type == "cpu":
            return taken
        images, labels = (x.to(self.device, non_blocking=True) for x in (taken.images, taken.labels))
        return Taken(images, labels, taken.skipped)

    def _receive(self, coming: Iterator[Taken]) -> Taken:
        try:
            return next(coming)
        except (RuntimeError, OSError, EOFError) as error:
            # Whoever is killed leaves its connections before the system knows how it has ended.
            hung_up = isinstance(error, (ConnectionError, EOFError))
            ended = wait([process.sentinel for process in self._processes], PATIENCE if hung_up else 0)
            for process in self._processes:
                if process.sentinel in ended:
                    process.join()
            dead = [f"{process.pid} (exit code {process.exitcode})" for process in self._processes if process.exitcode]
            if not dead:
                raise
            raise ChildProcessError(
                f"step {self._next_step}: a process that reads images has ended unexpectedly: {', '.join(dead)}; "
                "-9 is often a want of memory, and data.workers says how many there are"
            ) from error.with_traceback(None)  # whose frames would keep the others alive


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Start processes that signals pass by: they keep the mask that they are started under.

    The parent is told to stop by the same signals, finishes its step with them, and ends them itself. What torch makes
    of SIGCHLD, errors in the middle of anything, is undone.
    """
    resource_tracker.ensure_running()  # now, as starting it lets these signals through again
    on_death = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death)


def _end_with_the_parent(_: int) -> None:
    """End this worker as soon as its trainer has ended, however that was.

    torch's own watch begins when a worker is up, and would take whoever has adopted it by then for its trainer.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker was started by somebody

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="trainer's end", daemon=True).start()


def _as_it_is(taken: Any) -> Any:
    return taken

"""Loads the images of the coming steps in worker processes while training runs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pixelflow_kernels.transfers import uploaded
from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import Plan, plan_step

from .source import Taken, TrainingImages

PATIENCE = 5.0
"""Seconds to wait for the exit code of a worker whose connection was cut."""


class _Steps(Dataset["Taken | Exception"]):
    """A data set of steps: the images of a step, by its number. This is the part of the run that a worker receives.

    Errors that a user can mend are returned: torch would raise them again with the worker's traceback as their text.
    """

    def __init__(self, data: TrainingImages, config: TrainConfig, rank: int, world_size: int) -> None:
        self.data = data
        self.share = rank, world_size
        self.config = config

    def __getitem__(self, step: int) -> Taken | Exception:
        try:
            return self.data.take(plan_step(self.config, step, len(self.data), *self.share))
        except (ValueError, OSError) as error:
            if not _travels(error):
                raise
            return error


class Loader:
    """The images of a run's steps in order, prefetched by ``data.workers`` processes. A context manager.

    With 0 workers they are loaded on demand. The bits are the same, because images are a function of the plan. Workers
    are spawned rather than forked, because a fork would copy the locks of this process's threads. They run from
    entering to leaving the context.

    Args:
        data: the training images.
        config: the recipe.
        first_step: the first step that will be requested, from 0; the following ones must be requested in order, up to
            ``steps``.
        rank, world_size: see :func:`~pixelflow_training.plan.plan_step`.
        device: device of the images that :meth:`take` returns.
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
        self._taken: Iterator[Taken | Exception] | None = None
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
            generator=torch.Generator(),  # otherwise torch would draw from the global generator
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
        self._taken = None  # torch ends the workers when this is freed, unless a traceback still refers to it
        for process in self._processes:
            process.kill()
            process.join()

    def __len__(self) -> int:
        return len(self.data)

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the classes of ``data``."""
        return self.data.classes

    def listing(self) -> dict[str, str]:
        """Listing of ``data``."""
        return self.data.listing()

    def name(self, sample: int) -> str:
        """Name of a sample of ``data``."""
        return self.data.name(sample)

    def take(self, plan: Plan) -> Taken:
        """Return the images of a plan, which must be the plan of the next step.

        Raises:
            ValueError: the plan is of another step.
            ChildProcessError: a worker has ended unexpectedly.
            ValueError, OSError: of the data; see :meth:`TrainingImages.take`.
        """
        step = int(plan.position[0]) // self._steps.config.batch_size
        if step != self._next_step:
            raise ValueError(f"step: got {step}, expected {self._next_step}: a loader gives steps in their order")
        taken = self.data.take(plan) if self._taken is None else self._receive(self._taken)
        self._next_step += 1
        if self.device.type == "cpu":
            return taken
        images, labels = (uploaded(x, self.device) for x in (taken.images, taken.labels))
        return Taken(images, labels, taken.skipped)

    def _receive(self, coming: Iterator[Taken | Exception]) -> Taken:
        try:
            taken = next(coming)
        except (RuntimeError, OSError, EOFError) as error:
            # The connections of a killed process close before its exit code is available.
            hung_up = isinstance(error, (ConnectionError, EOFError))
            ended = wait([process.sentinel for process in self._processes], PATIENCE if hung_up else 0)
            for process in self._processes:
                if process.sentinel in ended:
                    process.join()
            dead = [f"{process.pid} (exit code {process.exitcode})" for process in self._processes if process.exitcode]
            if not dead:
                raise
            hint = "-9 is often a want of memory, and data.workers says how many there are"
            if {process.exitcode for process in self._processes} <= {1, None}:
                hint = 'its own message is above; a program that trains must do so under `if __name__ == "__main__":`'
            raise ChildProcessError(
                f"step {self._next_step}: a process that reads images has ended unexpectedly: {', '.join(dead)}; {hint}"
            ) from error.with_traceback(None)  # the frames of its traceback would keep the other workers alive
        if isinstance(taken, Exception):
            raise taken
        return taken


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Start child processes with SIGINT and SIGTERM blocked; they inherit the mask that they are started under.

    The trainer receives the same signals, finishes its step, which needs the workers, and then ends them itself.
    torch's SIGCHLD handler, which raises errors at arbitrary places, is replaced by the previous one.
    """
    resource_tracker.ensure_running()  # before the signals are blocked, because starting the tracker unblocks them
    on_death = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death)


def _end_with_the_parent(_: int) -> None:
    """End this worker as soon as its trainer has ended, for whatever reason.

    torch's own watchdog starts only when the worker is up. If the trainer has died by then, it would take the process
    that has adopted the worker for the trainer.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker always has a parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="trainer's end", daemon=True).start()


def _travels(error: Exception) -> bool:
    """Whether an error is the same after it was sent to another process."""
    try:
        arrived = pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return type(arrived) is type(error) and str(arrived) == str(error)


def _as_it_is(taken: Any) -> Any:
    return taken

"""Makes a step's batch while the device computes the step before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from .collate import Batch


class Ahead:
    """Batches in the order of their steps, one of which is prepared ahead.

    Args:
        make: makes the batch of a step without waiting for the device.
        steps: number of steps of the run; none is prepared beyond.
    """

    def __init__(self, make: Callable[[int], Batch], steps: int) -> None:
        self._make, self._steps = make, steps
        self._coming: tuple[int, Future[Batch]] | None = None

    def prepare(self, step: int) -> None:
        """Make a step's batch now. Its errors are raised by :meth:`take`: the step that runs is completed first."""
        if step >= self._steps:
            return
        future = Future[Batch]()
        try:
            future.set_result(self._make(step))
        except Exception as error:
            future.set_exception(error)
        self._coming = step, future

    def take(self, step: int) -> Batch:
        """Return a step's batch, which is made now unless it was prepared, and forget it."""
        coming, self._coming = self._coming, None
        return coming[1].result() if coming is not None and coming[0] == step else self._make(step)

"""The images of a run that could not be read: each is logged once, and too many of them stop it."""

from __future__ import annotations

from collections.abc import Iterable

from pixelflow_training.run import Log, Silence

from .source import SkippedImage


class SkippedImages:
    """Counts different images, by name, over all of a run.

    The log is the only record. It is cut where a run goes on and written before the checkpoint of its step, so none is
    lost and none is counted twice.

    Args:
        log: the run's, cut at the step that it goes on from; silence on ranks that keep none.
        limit: ``data.max_skipped``.
    """

    def __init__(self, log: Log | Silence, limit: int) -> None:
        self.limit = limit
        self._log = log
        self._names = {str(record["name"]): None for record in log.records("skipped_image")}  # in their order

    def __len__(self) -> int:
        return len(self._names)

    def add(self, step: int, images: Iterable[SkippedImage]) -> None:
        """Take in what was skipped on the way to a step.

        Raises:
            ValueError: there are more than the limit; the message has the last ones.
        """
        for name, reason in images:
            if name not in self._names:
                self._names[name] = None
                self._log.write({"event": "skipped_image", "step": step, "name": name, "reason": reason})
        if len(self) > self.limit:
            last = ", ".join(list(self._names)[-5:])
            raise ValueError(
                f"step {step}: {len(self)} images could not be read, and data.max_skipped is {self.limit}; "
                f"the last are {last}; the log has the reasons"
            )

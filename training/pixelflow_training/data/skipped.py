"""Tracks unreadable images: each is logged once, and too many of them stop the run."""

from __future__ import annotations

from collections.abc import Iterable

from pixelflow_training.run import Log, Silence

from .source import SkippedImage


class SkippedImages:
    """Counts the different unreadable images, by name, over the whole run.

    The log is the only record. It is cut where a run resumes and is written before the checkpoint of its step, so no
    image is lost from the count or counted twice.

    Args:
        log: the run's log, cut at the step to resume from; :class:`~pixelflow_training.run.Silence` on ranks without a
            log.
        limit: ``data.max_skipped``.
    """

    def __init__(self, log: Log | Silence, limit: int) -> None:
        self.limit = limit
        self._log = log
        self._names = {str(record["name"]): None for record in log.records("skipped_image")}  # in order

    def __len__(self) -> int:
        return len(self._names)

    def add(self, step: int, images: Iterable[SkippedImage]) -> None:
        """Count and log images that were skipped in preparing a step.

        Raises:
            ValueError: there are more than the limit; the message names the last five.
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

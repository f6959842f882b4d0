"""Graceful stopping: a signal lets the step finish and be saved; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: running the same command again resumes the run
EXIT_AT_ONCE = 130  # what a shell reports for a program ended by Ctrl-C


class TrainingStopped(Exception):  # noqa: N818 (not an error)
    """A run was told to stop and has saved a checkpoint; training it again resumes from there."""


class StopRequests:
    """Treats SIGTERM and SIGINT as requests to stop after the step; a second SIGINT raises KeyboardInterrupt.

    A context manager: the previous handlers are restored at its end. Outside the main thread, where Python allows no
    handlers, it changes nothing and receives nothing.

    Attributes:
        received: the first signal received, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

"""Being told to stop: a step is finished and saved first, unless the user insists."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

EXIT_STOPPED = 75  # the C library's EX_TEMPFAIL: run the same command again, and it goes on
EXIT_AT_ONCE = 130  # what a shell reports of a program that Ctrl-C ended


class TrainingStopped(Exception):  # noqa: N818 (nothing has gone wrong)
    """A run was told to stop and has saved a checkpoint; training it again goes on from there."""


class StopRequests:
    """SIGTERM and SIGINT as a request to stop after the step; a second SIGINT is a KeyboardInterrupt.

    Signals are handled inside ``with``; the handlers from before are put back at its end. Outside of the main thread,
    where Python allows no handlers, nothing is changed and nothing is received.

    Attributes:
        received: the first signal that came, None before.
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

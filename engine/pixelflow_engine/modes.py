"""The caller's autocast ends at the engine's door: an engine computes in the type that it was made with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch


@contextmanager
def without_autocast(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Inside, nothing is cast on the device or on the host.

    Yields:
        what makes a context in which it is as outside, for callbacks.
    """
    kinds = [kind for kind in sorted({"cpu", device.type}) if torch.amp.is_autocast_available(kind)]
    found = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    with ExitStack() as inside:
        for kind, _ in found:
            inside.enter_context(torch.autocast(kind, enabled=False))
        yield partial(_with_autocast, found)


@contextmanager
def _with_autocast(found: Sequence[tuple[str, torch.dtype]]) -> Iterator[None]:
    with ExitStack() as inside:
        for kind, dtype in found:
            inside.enter_context(torch.autocast(kind, dtype))
        yield

"""The caller's autocast and inference mode end at the engine's door.

An engine computes in the type that it was made with, and what it keeps can be written to in any mode.
"""

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
        yield partial(_as_before, found, torch.is_inference_mode_enabled())


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Inside, tensors are made that can be written to outside of inference mode; without gradients all the same."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _as_before(found: Sequence[tuple[str, torch.dtype]], inference: bool) -> Iterator[None]:
    with ExitStack() as inside:
        if inference:
            inside.enter_context(torch.inference_mode())
        for kind, dtype in found:
            inside.enter_context(torch.autocast(kind, dtype))
        yield

"""Training for PixelFlow on the engine's kernels.

Example::

    from pixelflow_training import load_config, train

    train(load_config("digits", ["steps=1000"]), "runs/digits")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TrainConfig, load_config
    from .data import ImageSource, UnreadableImageError
    from .loop import train
    from .signals import TrainingStopped

_HOMES = {
    "ImageSource": "data",
    "TrainConfig": "config",
    "TrainingStopped": "signals",
    "UnreadableImageError": "data",
    "load_config": "config",
    "train": "loop",
}

__all__ = ["ImageSource", "TrainConfig", "TrainingStopped", "UnreadableImageError", "load_config", "train"]


def __getattr__(name: str) -> object:
    """Import a public name on first access, so that ``pixelflow --help`` does not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

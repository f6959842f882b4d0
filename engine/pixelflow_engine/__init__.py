"""PixelFlow image generation: flow matching in pixel space over a cascade of resolutions.

Example::

    from pixelflow_engine import PixelFlowEngine

    engine = PixelFlowEngine.from_pretrained("digits")
    images = engine(class_labels=[3, 7], seed=1).images
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, convert, load_checkpoint, save_checkpoint
    from .config import ModelConfig, PixelFlowConfig, SchedulerConfig
    from .engine import PixelFlowEngine
    from .errors import BackendUnavailableError, CaptureError, CheckpointError, ConfigError, ConvergenceError
    from .events import SamplingOutput, StageEvent, StageReport, StepEvent
    from .requests import Request

_NAMES = {
    "checkpoint": ("Checkpoint", "convert", "load_checkpoint", "save_checkpoint"),
    "config": ("ModelConfig", "PixelFlowConfig", "SchedulerConfig"),
    "engine": ("PixelFlowEngine",),
    "errors": ("BackendUnavailableError", "CaptureError", "CheckpointError", "ConfigError", "ConvergenceError"),
    "events": ("SamplingOutput", "StageEvent", "StageReport", "StepEvent"),
    "requests": ("Request",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BackendUnavailableError",
    "CaptureError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ConvergenceError",
    "ModelConfig",
    "PixelFlowConfig",
    "PixelFlowEngine",
    "Request",
    "SamplingOutput",
    "SchedulerConfig",
    "StageEvent",
    "StageReport",
    "StepEvent",
    "convert",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> object:
    """Import a public name on first access, so that ``pixelflow --help`` loads neither these modules nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""PixelFlow image generation: a cascade of resolutions in pixel space, sampled by flow matching.

from pixelflow_engine import PixelFlowEngine

engine = PixelFlowEngine.from_pretrained("digits")
images = engine(class_labels=[3, 7], seed=1).images
"""

from .checkpoint import Checkpoint, convert, load_checkpoint, save_checkpoint
from .config import ModelConfig, PixelFlowConfig, SchedulerConfig
from .engine import PixelFlowEngine
from .errors import BackendUnavailableError, CaptureError, CheckpointError, ConfigError, ConvergenceError
from .events import StageEvent, StageReport, StepEvent
from .output import SamplingOutput
from .requests import Request

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

"""PixelFlow image generation: a cascade of resolutions in pixel space, sampled by flow matching.

from pixelflow_engine import PixelFlowEngine

engine = PixelFlowEngine.from_pretrained("digits")
images = engine(class_labels=[3, 7], seed=1).images
"""

from .checkpoint import Checkpoint, convert, load_checkpoint, save_checkpoint
from .config import ModelConfig, PixelFlowConfig, SchedulerConfig
from .engine import PixelFlowEngine, SamplingOutput
from .errors import BackendUnavailableError, CheckpointError, ConfigError, ConvergenceError
from .sampler import StageEvent, StageReport, StepEvent

__all__ = [
    "BackendUnavailableError",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "ConvergenceError",
    "ModelConfig",
    "PixelFlowConfig",
    "PixelFlowEngine",
    "SamplingOutput",
    "SchedulerConfig",
    "StageEvent",
    "StageReport",
    "StepEvent",
    "convert",
    "load_checkpoint",
    "save_checkpoint",
]

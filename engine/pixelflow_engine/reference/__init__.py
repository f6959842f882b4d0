"""PixelFlow in plain PyTorch: the model, schedule, solvers, sampler and training pair that the engine is held against.

Nothing here imports anything but torch, and nothing of the engine imports it: it is the independent truth of the tests.
"""

from .model import PixelFlowTransformer
from .noise import PublicNoise
from .sampler import sample, to_images
from .schedule import Stage, euler_times, guidance_weights, make_stages
from .solvers import dopri5
from .training import training_pair

__all__ = [
    "PixelFlowTransformer",
    "PublicNoise",
    "Stage",
    "dopri5",
    "euler_times",
    "guidance_weights",
    "make_stages",
    "sample",
    "to_images",
    "training_pair",
]

"""PixelFlow in plain PyTorch: the reference implementation that the engine is tested against.

It consists of the model, schedule, solvers, sampler and training pair. It imports only torch and the standard library,
and nothing in the engine imports it, so that it stays independent of what it tests.
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

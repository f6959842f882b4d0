"""Variable-length softmax attention within the members (sequences) of a pack: self and cross, forward and backward."""

from pixelflow_kernels.errors import BackendUnavailableError

from .backends import NAMES as BACKENDS
from .op import varlen_attention

__all__ = ["BACKENDS", "BackendUnavailableError", "varlen_attention"]

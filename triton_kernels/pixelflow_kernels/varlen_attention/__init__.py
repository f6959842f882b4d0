"""Softmax attention inside the members of a pack: self- and cross-attention, forward and backward."""

from pixelflow_kernels.errors import BackendUnavailableError

from .backends import NAMES as BACKENDS
from .op import varlen_attention

__all__ = ["BACKENDS", "BackendUnavailableError", "varlen_attention"]

"""Softmax attention inside the members of a pack: self- and cross-attention, forward and backward."""

from .backends import NAMES as BACKENDS
from .backends import BackendUnavailableError
from .op import varlen_attention

__all__ = ["BACKENDS", "BackendUnavailableError", "varlen_attention"]

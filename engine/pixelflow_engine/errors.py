"""The engine's exception types. Each also derives from the built-in exception that a caller would expect."""

from pixelflow_kernels.errors import BackendUnavailableError

__all__ = ["BackendUnavailableError", "CaptureError", "CheckpointError", "ConfigError", "ConvergenceError"]


class ConfigError(ValueError):
    """A configuration value is missing, unknown, of the wrong type or out of range; the message names it."""


class CheckpointError(ValueError):
    """A checkpoint is invalid, damaged or not understood; the message names the file and the problem."""


class ConvergenceError(RuntimeError):
    """An adaptive solver used up its attempts; the message says how far it came."""


class CaptureError(RuntimeError):
    """A step could not be captured into a CUDA graph.

    The engine stays usable; one made with ``graphs=False`` never captures.
    """

"""The engine's own error types, each also the built-in error that a caller would expect."""

from pixelflow_kernels.errors import BackendUnavailableError

__all__ = ["BackendUnavailableError", "CaptureError", "CheckpointError", "ConfigError", "ConvergenceError"]


class ConfigError(ValueError):
    """A configuration value is missing, unknown, of the wrong type or out of range; the message names it."""


class CheckpointError(ValueError):
    """A checkpoint cannot be trusted or understood; the message names the file and what is wrong with it."""


class ConvergenceError(RuntimeError):
    """An adaptive solver used up its attempts; the message says how far it came."""


class CaptureError(RuntimeError):
    """A step could not be captured into a graph; the engine goes on as before, also with ``graphs=False``."""

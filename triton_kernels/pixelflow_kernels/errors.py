"""Errors that callers of the operations and of the engine share."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""

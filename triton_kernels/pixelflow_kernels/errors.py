"""Exceptions shared by the operations and the engine."""


class BackendUnavailableError(RuntimeError):
    """A backend was requested by name and cannot run here; the message says why."""

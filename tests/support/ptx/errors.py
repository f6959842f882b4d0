"""What goes wrong in an emulated kernel."""

from __future__ import annotations


class EmulationError(Exception):
    """The kernel does what a GPU would not do reliably, or what the emulator does not know."""

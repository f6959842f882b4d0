"""Commands of ``pixelflow bench`` and ``pixelflow eval``, one module each."""

"""Commands of ``pixelflow bench`` and ``pixelflow eval``: a file each."""

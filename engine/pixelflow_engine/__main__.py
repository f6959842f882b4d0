"""``python -m pixelflow_engine``: the ``pixelflow`` command."""

from .cli import main

main()

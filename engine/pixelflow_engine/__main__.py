"""Run the ``pixelflow`` command by ``python -m pixelflow_engine``."""

from .cli import main

main()

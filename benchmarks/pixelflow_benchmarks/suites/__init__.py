"""Benchmark suites: one module or folder per ``pixelflow bench`` command that measures something."""

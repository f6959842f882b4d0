"""Measurements of the engine: the quality of what it generates."""

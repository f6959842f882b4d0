"""Benchmarks of the engine (speed, memory, energy, distance from float64) and quality of the generated images."""

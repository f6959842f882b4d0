"""Opponents of the engine in benchmarks: the reference with random weights, and a checkout of the published code."""

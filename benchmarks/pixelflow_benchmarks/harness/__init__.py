"""Measuring tools that all suites share (time, energy, hardware ceilings, launch counts) and the result files."""

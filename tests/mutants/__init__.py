"""Kernels broken by hand, to see that the tests notice: ``make mutants``.

A mutant is one small change to one source file. The kernels' package is copied with that change, and the tests of the
operation run against the copy; a mutant that no test fails on has survived.
"""

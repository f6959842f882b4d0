"""Evaluation of result files: comparisons, tables for Markdown pages, and the HTML report."""

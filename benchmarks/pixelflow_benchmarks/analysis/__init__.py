"""What result files say: changes between two of them, pages, tables."""

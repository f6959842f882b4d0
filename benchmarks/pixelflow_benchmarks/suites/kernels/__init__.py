"""``bench kernels``: every kernel compared with PyTorch, at the sizes of the published model."""

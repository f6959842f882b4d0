"""Every kernel beside PyTorch, at the sizes of the published model."""

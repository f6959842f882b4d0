"""``bench training``: a training step by the project's own loop and by others, on the same model, images, settings."""

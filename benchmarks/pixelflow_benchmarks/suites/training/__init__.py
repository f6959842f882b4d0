"""A step of training: the project's own loop beside others on the same model, images and settings."""

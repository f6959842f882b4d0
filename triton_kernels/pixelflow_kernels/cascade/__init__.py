"""Noise on entering a stage of the cascade, and the pairs that it is trained on."""

"""Whole images, from noise to pixels: the first one, and how many a second after that."""

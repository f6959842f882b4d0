"""``bench images``: whole images, from noise to pixels: the time of the first call and of those that follow."""

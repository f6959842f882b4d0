"""``bench coldstart``: what a user waits for before the first image, measured in new processes."""

"""Training of PixelFlow on packed multi-resolution batches, with the operations that the sampler uses."""

"""Training PixelFlow on packed, multi-resolution batches with the operations that sample."""

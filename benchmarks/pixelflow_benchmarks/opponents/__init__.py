"""Who runs beside the engine: the reference with random weights, a checkout of the published code."""

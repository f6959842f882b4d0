"""``bench stages``: a step of each stage of the model, by the engine and its opponents."""

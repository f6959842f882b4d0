"""A step of each stage of the model, engine beside its opponents."""

"""Checkpoints: reading the two public forms and our own, writing and converting between them.

====================  ===============================  ==================================================
form                  files                            integrity, checked on every load
====================  ===============================  ==================================================
ours                  config.json, model.safetensors   SHA-256 of every tensor and of config.json
public                config.yaml, model.pt            CRC-32 of model.pt's records; config.yaml has none
public, in training   config.yaml, any ``.pt``         the same
a run directory       recipe.yaml, a folder ``model``  those of the folder, which is of one of these forms
====================  ===============================  ==================================================

A file from elsewhere is data: no code in it runs, nothing that it names is imported, and what it claims
(sizes, shapes, types) is checked before memory is spent on it. Whatever is wrong, the answer is a
``CheckpointError`` that names the file, what was found and what was expected.
"""

from .api import Checkpoint, bundled_models, convert, load_checkpoint, save_checkpoint, save_training_checkpoint

__all__ = [
    "Checkpoint",
    "bundled_models",
    "convert",
    "load_checkpoint",
    "save_checkpoint",
    "save_training_checkpoint",
]

"""Checkpoints: read the two public forms and our own, write them and convert between them.

====================  ===============================  ==================================================
form                  files                            integrity, checked on every load
====================  ===============================  ==================================================
ours                  config.json, model.safetensors   SHA-256 of every tensor and of config.json
public                config.yaml, model.pt            CRC-32 of model.pt's records; config.yaml has none
public, in training   config.yaml, any ``.pt``         the same
a run directory       recipe.yaml, a folder ``model``  that of the folder, which is of one of these forms
====================  ===============================  ==================================================

Files are treated as untrusted data: no code in them runs, nothing that they name is imported, and what they claim
(sizes, shapes, types) is checked before memory is spent on it. Every problem with a file is a ``CheckpointError`` that
names the file, what was found and what was expected.
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

"""Initialization of a run: fresh weights, the weights of a checkpoint in any form, or the state to resume from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from pixelflow_engine.checkpoint import load_checkpoint
from pixelflow_engine.errors import ConfigError
from pixelflow_engine.model import PackedTransformer

from .checkpoint import Checkpointer
from .config import TrainConfig
from .ranks import ALONE, Ranks
from .run import RunDirectory
from .state import TrainState


def take_first_weights(model: PackedTransformer, config: TrainConfig, ranks: Ranks = ALONE) -> None:
    """Replace fresh weights by those of the checkpoint that the recipe's ``init_from`` names; no-op if it is None.

    The model configuration must be the same; stages, resolution and the dtype of the weights may differ. From a
    training checkpoint the averaged weights are taken. All ranks read the checkpoint; rank 0 reads it first, and its
    errors are raised on all ranks.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: the checkpoint is of another model; the message names the keys that differ.
    """
    if config.init_from is None:
        return
    source = config.init_from
    ranks.first_does(lambda: _load(model, config, source))
    if not ranks.first:
        _load(model, config, source)


def _load(model: PackedTransformer, config: TrainConfig, source: str) -> None:
    checkpoint = load_checkpoint(source)
    theirs, ours = asdict(checkpoint.config.model), asdict(config.model)
    differing = [
        f"model.{key}: got {ours[key]}, the checkpoint has {theirs[key]}"
        for key in ours
        if key != "dropout" and ours[key] != theirs[key]  # dropout only affects training, where it is always 0
    ]
    if differing:
        raise ConfigError(f"init_from: {checkpoint.source} is of another model: {'; '.join(differing)}")
    model.load_state_dict(checkpoint.state_dict, strict=True)


def begin_or_resume(
    run: RunDirectory,
    checkpoints: Checkpointer,
    state: TrainState,
    config: TrainConfig,
    from_step: int | None,
    classes: Sequence[str] | None = None,
) -> None:
    """Restore the state from a checkpoint, or save the initial state: a run that has a log always has a checkpoint."""
    begins = not checkpoints.restore(state, from_step)

    def prepare() -> None:
        if begins:
            run.check_unused()
        run.write_recipe(config)
        run.write_classes(classes if config.model.num_classes else None)

    checkpoints.ranks.first_does(prepare)
    if begins:
        checkpoints.save(state)
        checkpoints.wait()

"""How a run begins: with fresh weights, with those of a checkpoint in any form, or where it was left."""

from __future__ import annotations

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
    """Replace fresh weights by those that the recipe's ``init_from`` names, if it names any.

    The model must be the same; stages, resolution and the type of the weights may be others. Of a checkpoint from
    training the averaged weights are taken. All ranks read it, and the first one's errors are everybody's.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: it is of another model; the message names the keys.
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
        if key != "dropout" and ours[key] != theirs[key]  # which is of training alone, and always 0 here
    ]
    if differing:
        raise ConfigError(f"init_from: {checkpoint.source} is of another model: {'; '.join(differing)}")
    model.load_state_dict(checkpoint.state_dict, strict=True)


def begin_or_go_on(
    run: RunDirectory, checkpoints: Checkpointer, state: TrainState, config: TrainConfig, from_step: int | None
) -> None:
    """Fill the state from a checkpoint, or save its beginning: whatever has a log has a checkpoint."""
    begins = not checkpoints.restore(state, from_step)

    def prepare() -> None:
        if begins:
            run.check_unused()
        run.write_recipe(config)

    checkpoints.ranks.first_does(prepare)
    if begins:
        checkpoints.save(state)
        checkpoints.wait()

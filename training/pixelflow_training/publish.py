"""A run's weights in the published form, to pass on or to go on from with the published code."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from pixelflow_engine.checkpoint import save_training_checkpoint
from pixelflow_engine.errors import CheckpointError

from .checkpoint import Checkpointer
from .config import ComputeConfig, load_config
from .loop import build_model


def publish(run: Path, output: Path, from_step: int | None = None, overwrite: bool = False) -> Path:
    """Write trained and averaged weights of a run as a training checkpoint of the published form.

    The run is only read, and may go on meanwhile. **It must be your own**: loading its checkpoint runs whatever code
    its author put there.

    Args:
        run: its directory.
        output: folder to write ``config.yaml`` and ``model_STEP.pt`` into.
        from_step: which checkpoint; the last one by default.
        overwrite: replace what such a call has written there before.

    Returns:
        the path of the ``.pt`` file.

    Raises:
        CheckpointError: there is no run or no such checkpoint, or it is damaged; or ``output`` cannot be written.
        ConfigError: its recipe is not one.
    """
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise CheckpointError(f"{recipe}: missing; expected the directory of a run")
    # On this process alone, wherever it is trained.
    config = replace(load_config(str(recipe)), compute=ComputeConfig())
    weights = {key: build_model(config).requires_grad_(False).state_dict() for key in ("model", "ema")}
    counters = {"step": torch.tensor(0)}
    with warnings.catch_warnings():
        # torch says that it takes the process to be alone, which it is.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        # Not entered, which would tidy up: the run may be going on.
        if not (run / "checkpoints").is_dir() or not Checkpointer(run / "checkpoints", config).read(
            {**weights, "counters": counters}, from_step
        ):
            raise CheckpointError(f"{run}: holds no checkpoint")
    return save_training_checkpoint(
        output,
        config.network,
        weights["model"],
        weights["ema"],
        int(counters["step"]),
        overwrite,
    )

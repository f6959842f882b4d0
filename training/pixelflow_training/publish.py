"""Publishes a run's weights in the published form, to pass them on or to continue training with the published code."""

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
    """Write the trained and averaged weights of a run as a training checkpoint of the published form.

    The run is only read and may be in progress. **It must be your own**: loading its checkpoint runs whatever code its
    author put there.

    Args:
        run: the run directory.
        output: folder in which to write ``config.yaml`` and ``model_STEP.pt``.
        from_step: step of the checkpoint; the last one by default.
        overwrite: whether to replace what an earlier call has written there.

    Returns:
        the path of the ``.pt`` file.

    Raises:
        CheckpointError: there is no run or no such checkpoint, or it is damaged; or ``output`` cannot be written.
        ConfigError: ``recipe.yaml`` is not a valid recipe, or not that of the checkpoint.
    """
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise CheckpointError(f"{recipe}: missing; expected the directory of a run")
    # Default compute options: this process alone loads the weights, whatever the run uses.
    config = replace(load_config(str(recipe)), compute=ComputeConfig())
    weights = {key: build_model(config).requires_grad_(False).state_dict() for key in ("model", "ema")}
    counters = {"step": torch.tensor(0)}
    with warnings.catch_warnings():
        # torch warns that it assumes a single process, which is correct.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        # Not entered as a context, which would delete the unfinished saves of a run in progress.
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

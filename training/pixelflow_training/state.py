"""The state of a run: everything besides its recipe that its numbers depend on, as named tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from pixelflow_engine.model import PackedTransformer

from .config import TrainConfig
from .ema import EMA
from .guard import LossHistory
from .parallel import shard
from .ranks import ALONE, Ranks


class TrainState:
    """Weights, moments, averages and counters of a run.

    The position in the data is ``step * batch_size``: what a sample gets is a pure function of recipe and position.

    Args:
        config: the recipe.
        model: freshly initialized, on the training device; trained in place.
        ranks: the ranks over which the state is sharded.

    Attributes:
        model: the weights, float32.
        optimizer: AdamW with its moments.
        ema: the averaged weights.
        history: recent losses of each stage.
        step: number of steps done, including skipped ones.
        skipped: number of steps that changed nothing because a loss or gradient was not finite.
        skipped_in_row: number of such steps since the last one that counted.
        seconds: duration of the run up to the last save.
    """

    def __init__(self, config: TrainConfig, model: PackedTransformer, ranks: Ranks = ALONE) -> None:
        self.model, self.ema = model, EMA(model, config.ema_decay)
        shard(self.model, self.ema.model, config.compute, ranks)  # before moments are made: they are sharded alike
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.optimizer.lr,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        # AdamW would create these on its first step; with them, the state has the same names before and after it.
        for parameter in model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.history = LossHistory(config.scheduler.num_stages, config.guard.spike_factor)
        self.step = self.skipped = self.skipped_in_row = 0
        self.seconds = 0.0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state by group and name. Weights, moments and averages are the live tensors; the rest are copies.

        Everything is a tensor, because a checkpoint pickles all other types.
        """
        moments = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        counters = {
            "step": torch.tensor(self.step),
            "skipped": torch.tensor(self.skipped),
            "skipped_in_row": torch.tensor(self.skipped_in_row),
            "ema_step": torch.tensor(self.ema.step),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }
        return {
            "model": self.model.state_dict(),
            "optimizer": moments,
            "ema": self.ema.model.state_dict(),
            "counters": counters,
            "losses": {"history": self.history.tensor()},
        }

    def take_counters(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore counters and losses from the result of :meth:`tensors`, after a checkpoint was loaded into it."""
        counters = tensors["counters"]
        self.step = int(counters["step"])
        self.skipped = int(counters["skipped"])
        self.skipped_in_row = int(counters["skipped_in_row"])
        self.ema.step = int(counters["ema_step"])
        self.seconds = float(counters["seconds"])
        self.history.load(tensors["losses"]["history"])

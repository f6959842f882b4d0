"""What a step's numbers mean for the run: spikes are told, and too many steps that are not finite stop it."""

from __future__ import annotations

import json

from .config import TrainConfig
from .data import TrainingImages
from .files import replace_text
from .plan import plan_step
from .ranks import Ranks
from .run import Log, RunDirectory, Silence
from .state import TrainState
from .step import Stepped


class Findings:
    """Takes in steps: counts them in the state and tells the log what stands out.

    Args:
        config: the recipe.
        data: the training images.
        run: gets ``nonfinite.json`` where the run is stopped.
        log: the run's; silence on ranks that keep none.
        ranks: who is stopped together.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingImages, run: RunDirectory, log: Log | Silence, ranks: Ranks
    ) -> None:
        self._config, self._data, self._run, self._log, self._ranks = config, data, run, log, ranks

    def add(self, state: TrainState, done: Stepped) -> None:
        """Take in the step that the state has just done.

        Raises:
            FloatingPointError: more than ``guard.max_skipped`` steps in a row were not finite.
        """
        if done.finite:
            state.skipped_in_row = 0
            for spike in state.history.add(done.stage_loss):
                self._log.write({"event": "spike", "step": state.step, **spike._asdict()})
            return
        state.skipped += 1
        state.skipped_in_row += 1
        self._log.write(self._skipped(state, done))
        if state.skipped_in_row > self._config.guard.max_skipped:
            raise self._ranks.first_does(lambda: self._too_many(state))

    def _skipped(self, state: TrainState, done: Stepped) -> dict[str, object]:
        """The log's line of a step that changed nothing. Its numbers are text, as JSON knows no NaN."""
        return {
            "event": "skipped",
            "step": state.step,
            "loss": str(done.loss),
            "stage_loss": [None if value is None else str(value) for value in done.stage_loss],
            "grad_norm": str(done.norm),
            "samples": self._samples(state.step - 1),
            "skipped": state.skipped,
        }

    def _samples(self, step: int) -> list[str]:
        """The names of the images that the batch of a step (from 0) is made of.

        Others may stand in for some of them: those that cannot be read, whose names the log has too.
        """
        return sorted(map(self._data.name, plan_step(self._config, step, len(self._data)).sample.tolist()))

    def _too_many(self, state: TrainState) -> FloatingPointError:
        """Keep the samples of the steps that were skipped in a row, and say so."""
        first = state.step - state.skipped_in_row  # from 0
        batches = [{"step": step + 1, "samples": self._samples(step)} for step in range(first, state.step)]
        replace_text(self._run.nonfinite, json.dumps(batches) + "\n")
        return FloatingPointError(
            f"step {state.step}: the loss or the gradient was not finite for {state.skipped_in_row} steps in a row, "
            f"and guard.max_skipped is {self._config.guard.max_skipped}; their samples are in {self._run.nonfinite}"
        )

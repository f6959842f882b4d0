"""Checks the losses and gradient norm of each step: spikes are logged, too many non-finite steps stop the run."""

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
    """Counts non-finite steps in the state and logs them, as well as loss spikes.

    Args:
        config: the recipe.
        data: the training images.
        run: run directory, in which ``nonfinite.json`` is written if the run is stopped.
        log: the run's log; :class:`~.run.Silence` on ranks without one.
        ranks: all ranks of the run, which stop together.
    """

    def __init__(
        self, config: TrainConfig, data: TrainingImages, run: RunDirectory, log: Log | Silence, ranks: Ranks
    ) -> None:
        self._config, self._data, self._run, self._log, self._ranks = config, data, run, log, ranks

    def add(self, state: TrainState, done: Stepped) -> None:
        """Process the step that the state has just completed.

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
        """Build the log record of a step that changed nothing. Its numbers are text, because JSON has no NaN."""
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
        """Return the names of the images of a step's batch (step from 0).

        Unreadable images may have been replaced by others; the log has the names of the unreadable ones as well.
        """
        return sorted(map(self._data.name, plan_step(self._config, step, len(self._data)).sample.tolist()))

    def _too_many(self, state: TrainState) -> FloatingPointError:
        """Write the samples of the consecutive skipped steps to ``nonfinite.json`` and return the error to raise."""
        first = state.step - state.skipped_in_row  # from 0
        batches = [{"step": step + 1, "samples": self._samples(step)} for step in range(first, state.step)]
        replace_text(self._run.nonfinite, json.dumps(batches) + "\n")
        return FloatingPointError(
            f"step {state.step}: the loss or the gradient was not finite for {state.skipped_in_row} steps in a row, "
            f"and guard.max_skipped is {self._config.guard.max_skipped}; their samples are in {self._run.nonfinite}"
        )

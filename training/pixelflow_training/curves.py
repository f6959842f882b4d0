"""Reads a run's log into curves over its steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]

MEASURES = ("lr", "grad_norm", "images_per_second")


@dataclass(frozen=True, eq=False, slots=True)
class Curve:
    """Values over steps, in ascending order of the steps.

    Attributes:
        steps: ``[n]`` float64.
        values: ``[n]`` float64, finite.
    """

    steps: Float
    values: Float

    @classmethod
    def of(cls, points: Sequence[tuple[int, float | None]]) -> Curve:
        """Build a curve from (step, value) pairs, omitting those whose value is None."""
        kept = [(step, value) for step, value in points if value is not None]
        array = np.array(kept, dtype=np.float64).reshape(-1, 2)
        return cls(array[:, 0], array[:, 1])

    def __len__(self) -> int:
        return len(self.steps)

    def smoothed(self, width: float) -> Curve:
        """Replace each value by the mean of the values at most ``width / 2`` steps away.

        Near the first step the window is narrower: it reaches no further than that step is away. Losses fall steeply
        there, and the mean of a one-sided window would lie above them all.
        """
        if not len(self):
            return self
        reach = np.minimum(width / 2, self.steps - self.steps[0])
        first = np.searchsorted(self.steps, self.steps - reach, side="left")
        after = np.searchsorted(self.steps, self.steps + reach, side="right")
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        return Curve(self.steps, (sums[after] - sums[first]) / (after - first))


@dataclass(frozen=True, eq=False, slots=True)
class RunCurves:
    """The curves of one run.

    Attributes:
        name: label of the run.
        training, held_out: the loss of each stage; a stage without images has an empty curve.
        measures: a curve for each name in :data:`MEASURES`.
        spikes: steps and losses of the spikes of each stage.
        skipped: steps whose loss or gradient was not finite.
        last: the last step in the log.
    """

    name: str
    training: tuple[Curve, ...]
    held_out: tuple[Curve, ...]
    measures: dict[str, Curve]
    spikes: tuple[Curve, ...]
    skipped: tuple[int, ...]
    last: int


def read_curves(run: Path, name: str) -> RunCurves:
    """Read the log of a run that has ended or is still in progress.

    Args:
        run: a run directory, or a log file.
        name: label of the run.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a line is not one of a training log, or no step has been logged.
    """
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"run: {path} is not there; expected a run directory, or a log")
    records = _records(path)
    train = [record for record in records if record["event"] == "train"]
    held_out = [record for record in records if record["event"] == "held_out"]
    skipped = [record for record in records if record["event"] == "skipped"]
    if not train and not held_out and not skipped:
        raise ValueError(f"run: {path} has no step yet")
    stages = max(len(record["stage_loss"]) for record in [*train, *held_out, *skipped])
    spikes = [record for record in records if record["event"] == "spike"]
    return RunCurves(
        name=name,
        training=_of_stages(train, stages),
        held_out=_of_stages(held_out, stages),
        measures={key: Curve.of([(record["step"], record.get(key)) for record in train]) for key in MEASURES},
        spikes=tuple(Curve.of([(r["step"], r["loss"]) for r in spikes if r["stage"] == s]) for s in range(stages)),
        skipped=tuple(record["step"] for record in skipped),
        last=max(record["step"] for record in records),
    )


def _of_stages(records: Sequence[dict[str, Any]], stages: int) -> tuple[Curve, ...]:
    """Return a curve for each stage.

    A record with fewer stages contributes no points to the others, and losses that are text, because they are not
    finite, are omitted.
    """

    def points(stage: int) -> list[tuple[int, float | None]]:
        losses = [(r["step"], r["stage_loss"][stage]) for r in records if stage < len(r["stage_loss"])]
        return [(step, None if isinstance(loss, str) else loss) for step, loss in losses]

    return tuple(Curve.of(points(stage)) for stage in range(stages))


def _records(path: Path) -> list[dict[str, Any]]:
    """Parse the lines of a log. A last line that is only partly written is omitted."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = lines[:-1] if lines and not lines[-1].endswith("\n") else lines
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            expected = {"train": list, "held_out": list, "skipped": list}.get(record["event"], object)
            if not isinstance(record["step"], int) or not isinstance(record.get("stage_loss"), expected):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"run: {path}, line {number}: expected a line of a training log") from error
        records.append(record)
    return records


def short_names(runs: Sequence[Path]) -> list[str]:
    """Return labels for runs: names of directories or renamed logs; the given paths if the names are not unique."""
    paths = [(run.parent if run.name == "log.jsonl" else run).resolve() for run in runs]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    return names if len({*names}) == len(names) else [str(run) for run in runs]

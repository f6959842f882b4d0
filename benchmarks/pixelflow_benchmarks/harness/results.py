"""Result files: a line of JSON for each record, appended as it is measured and never rewritten.

A file holds any number of runs, of any suites. A run is a suite's records under one ``run``, the time it began: first
its ``environment``, then what it measured, ``end`` last; without an ``end`` it was cut short, and what is there stands.
The environment's ``options`` are those of its command that asked for something else than the command does of itself.

What was timed is a record of kind ``measurement``:

======================  ===============================================================================================
``case``, ``variant``   what was done, and who did it; together unique in a run
``right``               its result passed its check; where it did not, ``fault`` says why and there is no time
``per``                 what the seconds are for: ``"call"``, ``"image"``, ``"image and evaluation"``, ``"step"``,
                        ``"process"``
``seconds``             ``median``, ``low``, ``high`` (a fifth of the repeats lies below, a fifth above), ``repeats``
``times``               by opponent, how many times faster than it: the same four of the ratios of one turn
``floor_seconds``       what products and bytes take at the ``ceilings`` of the same run, where they are declared
``fraction_of_floor``   that over the median: 1 is as fast as can be
``joules``, ``watts``   of what the seconds are for, and while it ran, by a GPU's own counter; ``at_work`` has clocks,
                        temperature and what held clocks down meanwhile
======================  ===============================================================================================

A suite adds fields of its own. Who could not be had is a record of kind ``absent`` with ``variant`` and ``reason``.
Bytes are records of kind ``memory``, see :mod:`pixelflow_benchmarks.suites.memory.records`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from .environment import device_name, environment, state

Record = dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One run of a suite.

    Attributes:
        suite: its name.
        began: when, UTC, ISO 8601.
        records: in the order of measuring, the environment first.
    """

    suite: str
    began: str
    records: list[Record] = field(default_factory=list)

    @property
    def environment(self) -> Record:
        """Versions, hardware, sizes."""
        return self.records[0]

    @property
    def cut_short(self) -> bool:
        """Whether it has no end."""
        return bool(self.records[-1]["kind"] != "end")

    @property
    def lacks(self) -> list[str]:
        """What tells it from a complete run of what its command does of itself: sentences for a table's caption."""
        options, skipped = self.environment.get("options"), len(self.of_kind("skipped"))
        return [
            *([f"Run with `{options}`."] if options else []),
            *(["The run was cut short."] if self.cut_short else []),
            *([f"No time was left for {skipped} of its parts."] if skipped else []),
        ]

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one kind."""
        return [record for record in self.records if record["kind"] == kind]


@dataclass(frozen=True, eq=False, slots=True)
class Recorder:
    """Takes the records of a run that goes on."""

    run: Run
    file: TextIO | None

    def __call__(self, record: Record) -> None:
        """Keep a record; it is in the file at once."""
        self.run.records.append(record)
        if self.file is not None:
            line = json.dumps({"suite": self.run.suite, "run": self.run.began, **record}, allow_nan=False)
            print(line, file=self.file, flush=True)

    def all(self, records: Iterable[Record]) -> None:
        """Keep records as they come."""
        for record in records:
            self(record)


@contextlib.contextmanager
def recording(output: Path | None, suite: str, device: torch.device, **head: Any) -> Iterator[Recorder]:
    """A run, its environment first and, unless something is raised, its end last.

    Args:
        output: see :func:`result_file`; None keeps records in memory alone.
        suite: the suite's name.
        device: what is measured.
        head: what else the environment record says: shape, batch, ...
    """
    began = datetime.now(UTC)
    with contextlib.nullcontext() if output is None else result_file(output, device, began).open("a") as file:
        recorder = Recorder(Run(suite, began.isoformat(timespec="milliseconds")), file)
        recorder({"kind": "environment", **environment(device), "device": device_name(device), **head, **state(device)})
        yield recorder
        recorder({"kind": "end", **state(device)})


def check_output(output: Path) -> None:
    """Refuse what is neither a folder, there or to be made, nor a name that ends in ``.jsonl``.

    Raises:
        ValueError: it is a file of another kind.
    """
    if output.is_file() and output.suffix != ".jsonl":
        raise ValueError(f"output: got the file {output}, expected a folder or a name that ends in .jsonl")


def result_file(output: Path, device: torch.device, when: datetime) -> Path:
    """Where records go: ``output`` itself if its name ends in ``.jsonl``, else a file in that folder.

    Returns:
        ``output/<device>/<date>-<commit>.jsonl``, its folder made.

    Raises:
        ValueError: ``output`` is neither.
    """
    if output.suffix == ".jsonl" and not output.is_dir():
        return output
    check_output(output)
    head, _, changes = environment()["commit"].partition("+")
    path = output / device_name(device) / f"{when:%Y-%m-%d}-{head[:10]}{'+' if changes else ''}{changes}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_runs(path: Path) -> list[Run]:
    """All runs of a file, in the order of their beginning.

    Raises:
        ValueError: a line is not a record; the message names file and line.
    """
    runs: dict[tuple[str, str], Run] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"results: {path}: got bytes that are no text, expected a record a line") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
            suite, began = record.pop("suite"), record.pop("run")
            record["kind"]
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"results: {path}, line {number}: expected a record with suite, run and kind") from error
        run = runs.setdefault((suite, began), Run(suite, began))
        if not run.records and record["kind"] != "environment":
            raise ValueError(f"results: {path}, line {number}: expected a run to begin with its environment")
        run.records.append(record)
    return sorted(runs.values(), key=lambda run: run.began)


def result_files(folder: Path) -> list[Path]:
    """The files in a folder and below it that have the names which :func:`result_file` gives."""
    return sorted(folder.rglob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*.jsonl"))


def newest(runs: Sequence[Run], suite: str) -> Run | None:
    """The last run of a suite; None where there is none."""
    return max((run for run in runs if run.suite == suite), key=lambda run: run.began, default=None)


def to_show(runs: Sequence[Run], suite: str) -> Run | None:
    """The last complete run of what a suite's command does of itself; where none is, the last at all."""
    return newest([run for run in runs if not run.lacks], suite) or newest(runs, suite)

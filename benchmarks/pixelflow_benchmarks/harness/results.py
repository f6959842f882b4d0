"""Result files: one line of JSON per record, appended as it is measured and never rewritten.

A file holds any number of runs of any suites. The records of a run share the value of ``run``, the time at which it
began. The first record is the ``environment``, the last one ``end``; a run without ``end`` was cut short, and its
records remain valid. ``options`` in the environment lists the command's options that differed from their defaults.

A timing is a record of kind ``measurement``:

======================  ===============================================================================================
``case``, ``variant``   what was computed, and by which implementation; together unique in a run
``right``               whether the result passed its check; if not, ``fault`` says why and there is no time
``per``                 what the seconds are for: ``"call"``, ``"image"``, ``"image and evaluation"``, ``"step"``,
                        ``"process"``
``seconds``             ``median``, ``low``, ``high`` (20th and 80th percentile of the repeats), ``repeats``
``times``               by opponent, how many times faster than it: the same four figures of the ratios within a turn
``floor_seconds``       time of the products and bytes at the ``ceilings`` of the same run, where they are declared
``fraction_of_floor``   ``floor_seconds`` over the median: 1 is the best possible
``joules``, ``watts``   energy per unit of ``per`` and mean power, by a GPU's own counter; ``at_work`` has clocks,
                        temperature and throttling reasons during the runs
======================  ===============================================================================================

Suites add fields of their own. A variant that cannot run is a record of kind ``absent`` with ``variant`` and
``reason``. Bytes are records of kind ``memory``, see :mod:`pixelflow_benchmarks.suites.memory.records`.
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
        suite: name of the suite.
        began: time of the start, UTC, ISO 8601.
        records: in the order of measurement, the environment first.
    """

    suite: str
    began: str
    records: list[Record] = field(default_factory=list)

    @property
    def environment(self) -> Record:
        """The environment record: versions, hardware, sizes."""
        return self.records[0]

    @property
    def cut_short(self) -> bool:
        """Whether the run has no ``end`` record."""
        return bool(self.records[-1]["kind"] != "end")

    @property
    def lacks(self) -> list[str]:
        """Differences from a complete run with default options, as sentences for a table's caption."""
        options, skipped = self.environment.get("options"), len(self.of_kind("skipped"))
        return [
            *([f"Run with `{options}`."] if options else []),
            *(["The run was cut short."] if self.cut_short else []),
            *([f"No time was left for {skipped} of its parts."] if skipped else []),
        ]

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of one kind."""
        return [record for record in self.records if record["kind"] == kind]


@dataclass(frozen=True, eq=False, slots=True)
class Recorder:
    """Collects the records of a run in progress.

    Attributes:
        run: the run, whose records grow.
        file: result file that records are appended to; None keeps them in memory only.
    """

    run: Run
    file: TextIO | None

    def __call__(self, record: Record) -> None:
        """Add a record and, if there is a file, write it at once."""
        self.run.records.append(record)
        if self.file is not None:
            line = json.dumps({"suite": self.run.suite, "run": self.run.began, **record}, allow_nan=False)
            print(line, file=self.file, flush=True)

    def all(self, records: Iterable[Record]) -> None:
        """Add records as the iterable produces them."""
        for record in records:
            self(record)


@contextlib.contextmanager
def recording(output: Path | None, suite: str, device: torch.device, **head: Any) -> Iterator[Recorder]:
    """Record a run: its environment first and, unless an exception is raised, its end last.

    Args:
        output: see :func:`result_file`; None keeps records in memory only.
        suite: name of the suite.
        device: the measured device.
        head: further entries of the environment record: shape, batch, ...

    Yields:
        The recorder of the run.
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
    """Return the file for records: ``output`` itself if its name ends in ``.jsonl``, otherwise a file in that folder.

    Returns:
        ``output``, or ``output/<device>/<date>-<commit>.jsonl``; its folder is created.

    Raises:
        ValueError: ``output`` is a file with another suffix.
    """
    if output.suffix == ".jsonl" and not output.is_dir():
        output.parent.mkdir(parents=True, exist_ok=True)
        return output
    check_output(output)
    head, _, changes = environment()["commit"].partition("+")
    path = output / device_name(device) / f"{when:%Y-%m-%d}-{head[:10]}{'+' if changes else ''}{changes}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def read_runs(path: Path) -> list[Run]:
    """Read all runs of a file, sorted by the time they began.

    Raises:
        ValueError: a line is not a record, or a run does not begin with its environment; the message names file and
            line.
    """
    runs: dict[tuple[str, str], Run] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"results: {path}, line {bad}: expected UTF-8") from error
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
    """Return the files in a folder and below it whose names have the form that :func:`result_file` gives."""
    return sorted(folder.rglob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*.jsonl"))


def unread(folder: Path) -> list[Path]:
    """Return the other ``.jsonl`` files in a folder and below it; they may hold anything."""
    return sorted({*folder.rglob("*.jsonl")} - {*result_files(folder)}) if folder.is_dir() else []


def newest(runs: Sequence[Run], suite: str) -> Run | None:
    """Return the latest run of a suite; None if there is none."""
    return max((run for run in runs if run.suite == suite), key=lambda run: run.began, default=None)


def to_show(runs: Sequence[Run], suite: str) -> Run | None:
    """Return the latest complete run of a suite with default options; if there is none, the latest run of all."""
    return newest([run for run in runs if not run.lacks], suite) or newest(runs, suite)

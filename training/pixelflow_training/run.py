"""A run directory: its lock, its recipe and its log."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from pixelflow_engine.checkpoint.problems import listed

from .config import TrainConfig
from .files import make_folder, remove_leftovers, replace_text

STEP = re.compile(r"step-(\d{8,})")
"""Name of a checkpoint's folder, and of a sample sheet without its ending."""
SIGNS = ("recipe.yaml", "checkpoints", "log.jsonl")
"""The first things in a run directory; what is written before them has a hidden name."""


class RunDirectory:
    """The folder of one run; a context manager that locks it for one process at a time.

    ::

        recipe.yaml      the configuration
        classes.json     names of the classes by label, if the data have any
        log.jsonl        what happened, one JSON object per line
        checkpoints/     states to resume from
        model/           the averaged model as of the last evaluation, or of the step that the run went back to
        samples/         sample sheets, if the recipe asks for them
        tensorboard/     event files, if the recipe asks for them
        nonfinite.json   only if non-finite steps stopped the run: the images of their batches

    Args:
        path: the folder; created on entering the context if missing.
        fresh: whether to refuse a folder that already holds anything.

    Raises:
        FileExistsError: on entering: the folder holds anything and ``fresh`` was given, or holds something and no run;
            or another process trains there.
        OSError: on entering: the folder cannot be created or locked.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.fresh = fresh
        self.log_path = path / "log.jsonl"
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self.nonfinite = path / "nonfinite.json"
        self._lock = -1

    def __enter__(self) -> RunDirectory:
        if self.fresh and self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(f"output: {self.path} is not empty; a fresh run needs another directory")
        self._check_own()
        make_folder(self.path)
        # The lock is on the folder itself: it leaves no file behind, and is released however the process ends.
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise FileExistsError(f"output: another process trains in {self.path}") from error
        except OSError as error:
            os.close(self._lock)
            raise OSError(error.errno, f"{error.strerror} (to lock it)", str(self.path)) from error
        if self.model.exists():
            remove_leftovers(self.path, r"model\.\w+")  # of an export that was cut short
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def _check_own(self) -> None:
        """Refuse a folder of something else: a run would mix its files with those, or replace them."""
        found = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        others = [name for name in found if not name.startswith(".")]
        if others and not any(sign in others for sign in SIGNS):
            raise FileExistsError(
                f"output: {self.path} holds {listed(others)}, expected a run directory or an empty or new folder"
            )

    def check_unused(self) -> None:
        """Refuse to start a run on top of one that has no checkpoint.

        Raises:
            FileExistsError: there is a log or a model.
        """
        if self.log_path.exists() or self.model.exists():
            raise FileExistsError(
                f"output: {self.path} holds a run without checkpoints, which cannot be resumed; give another directory"
            )

    def write_recipe(self, config: TrainConfig) -> None:
        """Write the configuration as a recipe that can be trained again."""
        replace_text(self.path / "recipe.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))

    def write_classes(self, names: Sequence[str] | None) -> None:
        """Write the names of the classes by label; without names there is no file."""
        path = self.path / "classes.json"
        if names is None:
            path.unlink(missing_ok=True)
        else:
            replace_text(path, json.dumps(dict(enumerate(names)), indent=1) + "\n")

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return any(STEP.fullmatch(folder.name) for folder in self.checkpoints.glob("*"))

    def sample_path(self, step: int) -> Path:
        """Path of the sample sheet of a step."""
        return self.path / "samples" / f"step-{step:08d}.png"

    def evaluated_after(self, step: int) -> bool:
        """Whether the log has an evaluation of a later step, so that the model may be of that step."""
        if not self.log_path.exists():
            return False
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        return any('"held_out"' in line and not _is_within(line, step) for line in lines)

    def open_log(self, step: int, followers: Sequence[Follower] = ()) -> Log:
        """Open the log without the lines after ``step``; sample sheets of later steps are deleted."""
        for picture in self.sample_path(0).parent.glob("step-*.png"):
            found = STEP.fullmatch(picture.stem)
            if found and int(found[1]) > step:
                picture.unlink()
        return Log(self.log_path, step, followers)


class Follower(Protocol):
    """Receives every line of a log, from the first one on."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Process a line."""
        ...

    def close(self) -> None:
        """Process the end of the log."""
        ...


class Log:
    """A file of JSON objects, one per line, each with the ``step`` after which it was written; a context manager.

    Args:
        path: the file; created if missing.
        step: the log is cut before the first line of a later step. It is also cut before an incomplete line, which can
            only belong to a later step, because a checkpoint is saved after the log has been synchronized.
        followers: receive the lines that are kept, then every new one; closed with the log.
    """

    def __init__(self, path: Path, step: int, followers: Sequence[Follower] = ()) -> None:
        self._path = path
        self._followers = followers
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            kept = "".join(itertools.takewhile(lambda line: _is_within(line, step), text.splitlines(keepends=True)))
            if kept != text:
                replace_text(path, kept)
        else:
            replace_text(path, "")
        self._file = path.open("a", encoding="utf-8")
        if followers:
            for line in path.read_text(encoding="utf-8").splitlines():
                self._tell(json.loads(line))

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:  # closing retries a line that a full disk refused; do not hide the first error
            if error is None:
                raise
        finally:
            for follower in self._followers:
                follower.close()

    def records(self, event: str) -> list[dict[str, object]]:
        """Return the records of an event, in order."""
        with self._path.open(encoding="utf-8") as file:
            return [record for record in map(json.loads, file) if record.get("event") == event]

    def events(self, step: int) -> set[str]:
        """Return the events logged at a step."""
        with self._path.open(encoding="utf-8") as file:
            return {record["event"] for record in map(json.loads, file) if record["step"] == step}

    def write(self, record: dict[str, object]) -> None:
        """Append a line, visible to readers at once, and pass it to the followers.

        Raises:
            OSError: writing failed; the exception names the file, which Python's own does not when the disk is full.
        """
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._tell(record)

    def _tell(self, record: Mapping[str, Any]) -> None:
        for follower in self._followers:
            follower.write(record)

    def sync(self) -> None:
        """Synchronize the log to the disk: a checkpoint must not contain steps that the log has lost."""
        os.fsync(self._file.fileno())


class Silence:
    """A log that discards everything, for ranks other than 0: only rank 0 writes the run's log."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def records(self, event: str) -> list[dict[str, object]]:
        """Return no records."""
        return []

    def events(self, step: int) -> set[str]:
        """Return no events."""
        return set()

    def write(self, record: dict[str, object]) -> None:
        """Discard the record."""

    def sync(self) -> None:
        """Do nothing."""


def _is_within(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):  # the end of the log after a power failure
        return False

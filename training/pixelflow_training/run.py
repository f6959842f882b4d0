"""A run directory: who may write there, its recipe and its log."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from .config import TrainConfig
from .files import make_folder, replace_text

STEP = re.compile(r"step-(\d{8,})")
"""The name of a checkpoint's folder."""


class RunDirectory:
    """The folder of one run, held by one process at a time inside ``with``.

    ::

        recipe.yaml      the configuration
        log.jsonl        what happened, one JSON object a line
        checkpoints/     to go on from
        model/           the averaged model as of the last evaluation
        samples/         pictures, if the recipe asks for them
        tensorboard/     event files, likewise
        nonfinite.json   only if losses or gradients stopped the run: the images of their batches

    Args:
        path: made if it is not there.
        fresh: whether it must not hold anything yet.

    Raises:
        FileExistsError: it holds something and ``fresh`` was asked for, or another process trains there.
        OSError: it cannot be made or locked.
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
        make_folder(self.path)
        # A lock on the folder itself: it leaves no file, and goes with the process however that ends.
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
            for leftover in self.path.glob(".model.*"):  # of an export that was cut short
                shutil.rmtree(leftover)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def check_unused(self) -> None:
        """Refuse to begin a run on top of one that has no checkpoint.

        Raises:
            FileExistsError: there is a log or a model.
        """
        if self.log_path.exists() or self.model.exists():
            raise FileExistsError(
                f"output: {self.path} holds a run without checkpoints, which cannot go on; give another directory"
            )

    def write_recipe(self, config: TrainConfig) -> None:
        """Keep the configuration as a recipe that can be trained again."""
        replace_text(self.path / "recipe.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is one to go on from."""
        return any(STEP.fullmatch(folder.name) for folder in self.checkpoints.glob("*"))

    def sample_path(self, step: int) -> Path:
        """Where the picture of a step belongs."""
        return self.path / "samples" / f"step-{step:08d}.png"

    def open_log(self, step: int, followers: Sequence[Follower] = ()) -> Log:
        """The log, without the lines after ``step``; pictures of later steps are deleted."""
        for picture in self.sample_path(0).parent.glob("step-*.png"):
            if picture > self.sample_path(step):
                picture.unlink()
        return Log(self.log_path, step, followers)


class Follower(Protocol):
    """Who is told every line of a log, from the first one on."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take in a line."""
        ...

    def close(self) -> None:
        """There are no more."""
        ...


class Log:
    """A file of JSON objects, one a line, each with the ``step`` that it was written after; used inside ``with``.

    Args:
        path: made if it is not there.
        step: the log is cut at its first line of a later step; also at one that is not whole, which can only be later,
            because a checkpoint waits for the log.
        followers: told the lines that are kept, then every new one; closed with the log.
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
        except OSError:  # a line that found no room is tried again, and would hide what is known of it
            if error is None:
                raise
        finally:
            for follower in self._followers:
                follower.close()

    def records(self, event: str) -> list[dict[str, object]]:
        """What it holds of an event, in order."""
        with self._path.open(encoding="utf-8") as file:
            return [record for record in map(json.loads, file) if record.get("event") == event]

    def events(self, step: int) -> set[str]:
        """What has happened after a step."""
        with self._path.open(encoding="utf-8") as file:
            return {record["event"] for record in map(json.loads, file) if record["step"] == step}

    def write(self, record: dict[str, object]) -> None:
        """Append a line, seen by readers at once.

        Raises:
            OSError: with the file's name, which Python does not say of a disk that is full.
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
        """Bring the log to the disk: a checkpoint must not know of steps that the log has lost."""
        os.fsync(self._file.fileno())


class Silence:
    """The log of a rank that keeps none: the first one's is the run's."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def records(self, event: str) -> list[dict[str, object]]:
        """None."""
        return []

    def events(self, step: int) -> set[str]:
        """None."""
        return set()

    def write(self, record: dict[str, object]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""


def _is_within(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):  # what a power cut has made of the end
        return False

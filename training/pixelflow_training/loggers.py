"""Loggers that receive the lines of a run's log in addition to the log file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .config import TrainConfig
from .run import Follower, RunDirectory

SPEEDS = ("images_per_second", "tokens_per_second", "flops_per_second", "mfu")


class TensorBoard:
    """Writes TensorBoard event files from the log's lines.

    The log is authoritative. When a run resumes, the old event files are deleted and rewritten from the log, which has
    been cut at the checkpoint. Each step therefore occurs exactly once, whatever a killed process had written.

    Args:
        run: the run directory; event files go to its ``tensorboard`` folder, sample sheets are read from the paths in
            the log.
        seconds: duration of the run so far; events are dated by the ``seconds`` of their lines.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, run: RunDirectory, seconds: float) -> None:
        self._run = run
        self._began = time.time() - seconds
        self._last = 0.0
        folder = run.path / "tensorboard"
        writer = summary_writer()
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = writer(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a line of the log; events without numbers or sample sheets are ignored."""
        step = record["step"]
        self._last = record.get("seconds", self._last)
        when = self._began + self._last
        if record["event"] == "samples" and "file" in record:
            if (picture := self._run.path / record["file"]).is_file():
                with Image.open(picture) as image:
                    pixels = np.asarray(image.convert("RGB"))
                self._writer.add_image("samples", pixels, step, walltime=when, dataformats="HWC")
            return
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, step, walltime=when)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a log line, by tag."""
    match record["event"]:
        case "train":
            names = ("grad_norm", "lr", *(name for name in SPEEDS if name in record))
            return {"loss": record["loss"], **_by_stage("loss", record), **{name: record[name] for name in names}}
        case "held_out":
            return _by_stage("held_out", record)
        case "spike":
            return {f"spike/stage {record['stage']}": record["loss"]}
        case "skipped":
            return {"skipped": record["skipped"]}
    return {}


def _by_stage(tag: str, record: Mapping[str, Any]) -> dict[str, float]:
    # Non-finite losses are text in the log; float() converts them back.
    losses = enumerate(record["stage_loss"])
    return {f"{tag}/stage {stage}": float(loss) for stage, loss in losses if loss is not None}


def summary_writer() -> Any:
    """Import and return the class that writes event files.

    Raises:
        ImportError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("loggers: tensorboard is not installed: the extra `tensorboard` has it") from error
    return SummaryWriter


def check_loggers(config: TrainConfig) -> None:
    """Refuse a recipe whose loggers are not installed, before anything is written.

    Raises:
        ImportError: the message names what is missing.
    """
    if "tensorboard" in config.loggers:
        summary_writer()


def followers(config: TrainConfig, run: RunDirectory, seconds: float) -> Sequence[Follower]:
    """Create the loggers that the recipe names."""
    return [TensorBoard(run, seconds)] if "tensorboard" in config.loggers else []

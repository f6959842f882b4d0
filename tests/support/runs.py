"""Runs to compare: what is in a run directory, and training in a process that may be killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pixelflow_engine import load_checkpoint
from pixelflow_training import loop
from pixelflow_training.checkpoint import Checkpointer
from pixelflow_training.config import TrainConfig
from pixelflow_training.state import TrainState
from support.disk import Disk
from support.recipes import tiny_recipe

# What a process that is forked off has imported already; the first step of a run asks for torch._dynamo.
PRELOADED = ["pixelflow_training.loop", "sklearn.datasets", "torch._dynamo"]

TIMES = ("images_per_second", "tokens_per_second", "flops_per_second", "seconds")


def digest(tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """SHA-256 of a state by name, type and bits; times are left out."""
    sha = hashlib.sha256()
    for group, members in sorted(tensors.items()):
        for name, tensor in sorted(members.items()):
            if name != "seconds":
                sha.update(f"{group}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def lines(run: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def state_of(run: Path, config: TrainConfig) -> TrainState:
    """A run's last checkpoint."""
    state = TrainState(config, loop.build_model(config))
    with Checkpointer(run / "checkpoints", config) as checkpoints:
        assert checkpoints.restore(state), "no checkpoint"
    return state


def outcome(run: Path, config: TrainConfig) -> dict[str, Any]:
    """All of a run that must not depend on how often it was stopped."""
    return {
        "state": digest(state_of(run, config).tensors()),
        "log": lines(run),
        "model": digest({"model": load_checkpoint(run / "model").state_dict}),
        "recipe": (run / "recipe.yaml").read_text(encoding="utf-8"),
    }


# --- a process of its own ----------------------------------------------------------------------------------


def in_process(target: Callable[..., None], *arguments: Any) -> int | None:
    """Run a function in a fresh process, forked off one that has imported torch; its exit code, -9 for SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def at_step(step: int, act: Callable[[], None]) -> None:
    """Do something when the batch of a step (from 0) is asked for."""
    honest = loop.training_batch

    def watching(config: TrainConfig, data: Any, now: int, *share: int) -> Any:
        if now == step:
            act()
        return honest(config, data, now, *share)

    loop.training_batch = watching


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def train_killed_at_step(folder: Path, overrides: list[str], step: int) -> None:
    """For :func:`in_process`: SIGKILL when a step begins, whatever the writer is doing then."""
    at_step(step, lambda: send(signal.SIGKILL))
    loop.train(tiny_recipe(folder, *overrides), folder / "run", quiet=True)


def train_killed_on_disk(folder: Path, overrides: list[str], operation: int) -> None:
    """For :func:`in_process`: SIGKILL at an operation on the checkpoints' folder."""
    with Disk(folder / "run" / "checkpoints", operation, "kill"):
        loop.train(tiny_recipe(folder, *overrides), folder / "run", quiet=True)


def train_by_command(folder: Path, overrides: list[str], step: int, signals: list[signal.Signals]) -> None:
    """For :func:`in_process`: ``pixelflow train``, sent signals when a step begins."""
    from pixelflow_training.cli import train

    def act() -> None:
        for number in signals:
            send(number)

    at_step(step, act)
    tiny_recipe(folder)
    train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--quiet", *overrides])

"""Comparing training runs: the contents of a run directory, and training in a process that may be killed."""

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
from pixelflow_training.step import TrainStep
from support.disk import Disk
from support.recipes import tiny_recipe

# Modules already imported in the process that is forked; the first step of a run needs torch._dynamo.
PRELOADED = ["pixelflow_training.loop", "sklearn.datasets", "torch._dynamo"]

TIMES = ("images_per_second", "tokens_per_second", "flops_per_second", "seconds")


def digest(tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return the SHA-256 of a state by name, type and bits, without times."""
    sha = hashlib.sha256()
    for group, members in sorted(tensors.items()):
        for name, tensor in sorted(members.items()):
            if name != "seconds":
                sha.update(f"{group}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the log without its times."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def state_of(run: Path, config: TrainConfig) -> TrainState:
    """Return the state in a run's last checkpoint."""
    state = TrainState(config, loop.build_model(config))
    with Checkpointer(run / "checkpoints", config) as checkpoints:
        assert checkpoints.restore(state), "no checkpoint"
    return state


def outcome(run: Path, config: TrainConfig) -> dict[str, Any]:
    """Return everything about a run that must not depend on how often it was stopped."""
    return {
        "state": digest(state_of(run, config).tensors()),
        "log": lines(run),
        "model": digest({"model": load_checkpoint(run / "model").state_dict}),
        "recipe": (run / "recipe.yaml").read_text(encoding="utf-8"),
    }


# --- a process of its own ----------------------------------------------------------------------------------


def in_process(target: Callable[..., None], *arguments: Any) -> int | None:
    """Run a function in a process forked from one that has imported torch; return its exit code, -9 for SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def at_step(step: int, act: Callable[[], None], put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Call ``act`` when a step (from 0) begins, before it is launched; its batch was made during the one before.

    ``put`` sets the attribute that is replaced: for good, unless it is a monkeypatch's.
    """
    honest = TrainStep.begin

    def watching(self: TrainStep, *arguments: Any) -> Any:
        if self.state.step == step:
            act()
        return honest(self, *arguments)

    put(TrainStep, "begin", watching)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def train_killed_at_step(folder: Path, overrides: list[str], step: int) -> None:
    """Train, killed when a step begins, whatever the writer is doing then; a target of :func:`in_process`."""
    at_step(step, lambda: send(signal.SIGKILL))
    loop.train(tiny_recipe(folder, *overrides), folder / "run", quiet=True)


def train_killed_on_disk(folder: Path, overrides: list[str], operation: int) -> None:
    """Train, killed at an operation on the checkpoints' folder; a target of :func:`in_process`."""
    with Disk(folder / "run" / "checkpoints", operation, "kill"):
        loop.train(tiny_recipe(folder, *overrides), folder / "run", quiet=True)


def train_by_command(folder: Path, overrides: list[str], step: int, signals: list[signal.Signals]) -> None:
    """Run ``pixelflow train``, sent signals when a step begins; a target of :func:`in_process`."""
    from pixelflow_training.cli import train

    def act() -> None:
        for number in signals:
            send(number)

    at_step(step, act)
    tiny_recipe(folder)
    train(["--config", str(folder / "tiny.yaml"), "--output", str(folder / "run"), "--quiet", *overrides])

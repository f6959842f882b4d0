"""A run that is stopped anywhere and trained again ends as if it had never stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_engine.checkpoint import load_checkpoint
from pixelflow_engine.errors import CheckpointError, ConfigError
from pixelflow_training import checkpoint, files, loop
from pixelflow_training.cli import train
from pixelflow_training.config import TrainConfig
from pixelflow_training.publish import publish
from pixelflow_training.run import Log, RunDirectory
from pixelflow_training.signals import EXIT_AT_ONCE, EXIT_STOPPED, StopRequests, TrainingStopped
from support.disk import Disk
from support.packs import FUZZ
from support.recipes import tiny_recipe
from support.runs import (
    at_step,
    digest,
    in_process,
    lines,
    outcome,
    send,
    state_of,
    train_by_command,
    train_killed_at_step,
    train_killed_on_disk,
)

# Logs, evaluations and checkpoints at steps of their own.
OVERRIDES = ["steps=11", "log_every=2", "eval_every=5", "checkpoint.every=3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_recipe(folder, *OVERRIDES)
    loop.train(config, folder / "run", quiet=True)
    return outcome(folder / "run", config)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_recipe(tmp_path, *OVERRIDES)


class StopError(Exception):
    """An error of the data, say."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something when a step (from 0) begins."""
    at_step(step, act, monkeypatch.setattr)


def fail() -> None:
    raise StopError


def break_off(config: TrainConfig, run: Path, step: int) -> None:
    """Train until an error when a step (from 0) begins."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, fail)
        with pytest.raises(StopError):
            loop.train(config, run, quiet=True)


# --- killed ------------------------------------------------------------------------------------------------


def test_a_run_killed_anywhere_ends_as_if_it_never_was(tmp_path: Path, whole: dict[str, Any]) -> None:
    """SIGKILL when a step begins, and in the middle of saves; each time the same command goes on."""
    generator = random.Random(seed := 1 if FUZZ == 1 else random.randrange(2**32))
    print(f"seed {seed}")
    run, config = tmp_path / "run", tiny_recipe(tmp_path, *OVERRIDES)
    with Disk(tmp_path / "counted" / "checkpoints") as disk:
        loop.train(config, tmp_path / "counted", quiet=True)
    one_save = disk.count // 5  # at steps 0, 3, 6, 9 and 11
    kills = 0
    for _ in range(2 * FUZZ):
        # In the first save, or in the one after it: what a process that goes on does first.
        code = in_process(train_killed_on_disk, tmp_path, OVERRIDES, generator.randrange(2 * one_save))
        kills += code == -signal.SIGKILL
        done = state_of(run, config).step if (run / "log.jsonl").exists() else 0
        code = in_process(train_killed_at_step, tmp_path, OVERRIDES, generator.randrange(done, 11)) if done < 11 else 0
        kills += code == -signal.SIGKILL
    assert kills >= 2
    assert in_process(train_killed_at_step, tmp_path, OVERRIDES, 99) == 0
    assert outcome(run, config) == whole


@pytest.mark.parametrize("step", [0, 1, 3, 4, 10] if FUZZ == 1 else range(11))
def test_a_run_that_broke_off_at_a_step_goes_on(
    tmp_path: Path, config: TrainConfig, whole: dict[str, Any], step: int
) -> None:
    break_off(config, tmp_path / "run", step)
    begun = []
    with pytest.MonkeyPatch.context() as patch:
        for later in range(11):
            stop_at(patch, later, lambda now=later: begun.append(now))
        loop.train(config, tmp_path / "run", quiet=True)
    assert begun == list(range(step - step % 3, 11))
    assert outcome(tmp_path / "run", config) == whole


def test_stopped_at_every_step_it_still_arrives(
    tmp_path: Path, config: TrainConfig, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal a step: counters, moments and averages pass through a checkpoint ten times over."""
    honest = loop.training_batch

    def interrupted(*arguments: Any) -> Any:
        send(signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(loop, "training_batch", interrupted)
    for step in range(1, 11):
        with pytest.raises(TrainingStopped, match=f"SIGTERM: stopped and saved after step {step}$"):
            loop.train(config, tmp_path / "run", quiet=True)
    loop.train(config, tmp_path / "run", quiet=True)  # the last step ends the run, signal or not
    assert outcome(tmp_path / "run", config) == whole


def test_times_go_on(tmp_path: Path, config: TrainConfig) -> None:
    break_off(config, tmp_path / "run", 8)
    loop.train(config, tmp_path / "run", quiet=True)
    text = (tmp_path / "run" / "log.jsonl").read_text()
    seconds = [json.loads(line)["seconds"] for line in text.splitlines()]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


# --- told to stop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "code", "saved"),
    [
        ([signal.SIGTERM], EXIT_STOPPED, 5),
        ([signal.SIGINT], EXIT_STOPPED, 5),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], EXIT_STOPPED, 5),
        ([signal.SIGINT, signal.SIGINT], EXIT_AT_ONCE, 3),
    ],
    ids=lambda value: "+".join(s.name for s in value) if isinstance(value, list) else str(value),
)
def test_signals_finish_the_step_and_save(
    tmp_path: Path, config: TrainConfig, whole: dict[str, Any], signals: list[signal.Signals], code: int, saved: int
) -> None:
    assert in_process(train_by_command, tmp_path, OVERRIDES, 4, signals) == code
    state = state_of(tmp_path / "run", config)
    # A second Ctrl-C does not wait for the save under way, so that of step 3 may or may not have been complete.
    assert state.step == saved or (code == EXIT_AT_ONCE and state.step == 0)
    loop.train(config, tmp_path / "run", quiet=True)
    assert outcome(tmp_path / "run", config) == whole


def test_a_stop_is_saved_before_an_evaluation_that_is_due(
    tmp_path: Path, config: TrainConfig, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has told us to stop may not wait for it; it is made up for."""
    with monkeypatch.context() as patch:
        stop_at(patch, 4, lambda: send(signal.SIGTERM))
        patch.setattr(loop, "held_out_loss", lambda *_: pytest.fail("evaluated"))
        with pytest.raises(TrainingStopped, match="after step 5"):
            loop.train(config, tmp_path / "run", quiet=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 10, lambda: send(signal.SIGTERM))  # the last step, after which there is but the evaluation
        honest = loop.export
        patch.setattr(
            loop, "export", lambda run, state, *rest: fail() if state.step == 11 else honest(run, state, *rest)
        )
        with pytest.raises(StopError):
            loop.train(config, tmp_path / "run", quiet=True)
    assert state_of(tmp_path / "run", config).step == 11
    loop.train(config, tmp_path / "run", quiet=True)
    assert outcome(tmp_path / "run", config) == whole


def train_signalled_in_the_last_save(folder: Path, overrides: list[str], number: signal.Signals) -> None:
    """For :func:`in_process`: training is over, and waits for its writer."""
    honest = checkpoint._Writer.write_data

    def write(self: Any, *arguments: Any) -> Any:
        if "step-00000011" in str(self.path):
            time.sleep(0.5)
            send(number)
            time.sleep(0.5)
        return honest(self, *arguments)

    checkpoint._Writer.write_data = write  # type: ignore[method-assign]
    train_by_command(folder, overrides, 99, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_last_save_does_not_lose_it(
    tmp_path: Path, config: TrainConfig, whole: dict[str, Any], number: signal.Signals
) -> None:
    assert in_process(train_signalled_in_the_last_save, tmp_path, OVERRIDES, number) == 0
    assert outcome(tmp_path / "run", config) == whole


def test_a_stop_that_cannot_be_saved_is_not_called_saved(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 1, lambda: send(signal.SIGTERM))
    with (
        Disk(tmp_path / "run" / "checkpoints" / ".step-00000002.partial", 0, "full"),
        pytest.raises(OSError, match=r"step-00000002: .* No space left on device; the last one is step-00000000"),
    ):
        loop.train(config, tmp_path / "run", quiet=True)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequests() as stop:
        assert stop.received is None
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        send(signal.SIGINT)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# --- the run directory -------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    loop.train(config, run, quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(loop, "training_batch", lambda *_: pytest.fail("training has begun"))
    assert loop.train(config, run, quiet=True) == run / "model"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    short, long = (tiny_recipe(tmp_path, "optimizer.schedule=constant", f"steps={n}") for n in (4, 7))
    loop.train(long, tmp_path / "at once", quiet=True)
    loop.train(short, tmp_path / "run", quiet=True)
    loop.train(long, tmp_path / "run", quiet=True)
    ours, theirs = (state_of(tmp_path / name, long) for name in ("run", "at once"))
    assert digest(ours.tensors()) == digest(theirs.tensors())
    assert "steps: 7" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_a_run_that_was_stopped_can_be_ended_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the shorter run then, its model and picture too; and no run ends before it has come to."""
    constant = ["optimizer.schedule=constant", "eval_every=5", "samples.every=5", "samples.rows=1", "samples.steps=[1]"]
    long, short, shorter = (tiny_recipe(tmp_path, *constant, f"steps={n}") for n in (9, 4, 3))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: send(signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="after step 4"):
            loop.train(long, run, quiet=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"^steps: got 3, expected at least 4: .*step-00000004 is .*\(there is: 0, 4\)"
    ):
        loop.train(shorter, run, quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert loop.train(short, run, quiet=True) == run / "model"
    loop.train(short, tmp_path / "at once", quiet=True)
    assert outcome(run, short) == outcome(tmp_path / "at once", short)


def test_going_back_to_an_earlier_step(tmp_path: Path, config: TrainConfig, whole: dict[str, Any]) -> None:
    run = tmp_path / "run"
    loop.train(config, run, quiet=True)
    victim = run / "checkpoints" / "step-00000011" / "__0_0.distcp"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000011/__0_0.distcp: .*--from-step \(there is: 9\)"):
        loop.train(config, run, quiet=True)
    loop.train(config, run, quiet=True, from_step=9)
    assert outcome(run, config) == whole
    with pytest.raises(CheckpointError, match=r"step-00000005: missing; .*\(there is: 9, 11\)"):
        loop.train(config, run, quiet=True, from_step=5)


@pytest.mark.parametrize("step", [5, 6])  # with an evaluation and without
def test_the_model_goes_back_as_well(tmp_path: Path, step: int) -> None:
    overrides = [*OVERRIDES, "checkpoint.every=1", "checkpoint.keep=20", "optimizer.schedule=constant"]
    run = tmp_path / "run"
    loop.train(tiny_recipe(tmp_path, *overrides), run, quiet=True)
    later = load_checkpoint(run / "model").state_dict
    loop.train(tiny_recipe(tmp_path, *overrides, f"steps={step}"), run, quiet=True, from_step=step)
    want = load_checkpoint(publish(run, tmp_path / "published", from_step=step)).state_dict
    got = load_checkpoint(run / "model").state_dict
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not all(torch.equal(later[name], want[name]) for name in want)


def test_the_model_goes_back_to_the_checkpoint_of_a_run_that_broke_off(tmp_path: Path, config: TrainConfig) -> None:
    """It was evaluated at step 5, and begins again at step 3."""
    run = tmp_path / "run"
    break_off(config, run, 5)
    assert RunDirectory(run).evaluated_after(3)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3, lambda: send(signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="after step 4"):
            loop.train(config, run, quiet=True)
    want = load_checkpoint(publish(run, tmp_path / "published", from_step=3)).state_dict
    got = load_checkpoint(run / "model").state_dict
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_fresh_wants_an_empty_directory(tmp_path: Path, config: TrainConfig) -> None:
    run = tmp_path / "run"
    run.mkdir()
    break_off(config, run, 1)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="not empty"):
        loop.train(config, run, quiet=True, fresh=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    short = tiny_recipe(tmp_path, "steps=1")
    for name in ("empty", "none"):
        assert loop.train(short, tmp_path / name, quiet=True, fresh=True).is_dir()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--fresh"], FileExistsError, "not empty"),
        (["--from-step", "7"], CheckpointError, r"00007: missing; .*is: 0\)"),
    ],
)
def test_the_command_says_how_to_begin(
    tmp_path: Path, config: TrainConfig, options: list[str], error: type[Exception], message: str
) -> None:
    break_off(config, tmp_path / "run", 1)
    command = ["--config", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), *options, *OVERRIDES]
    with pytest.raises(error, match=message):
        CliRunner().invoke(train, command, catch_exceptions=False)


def test_a_run_without_checkpoints_is_not_overwritten(tmp_path: Path, config: TrainConfig) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(FileExistsError, match="without checkpoints"):
        loop.train(config, run, quiet=True)
    assert (run / "log.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("name", ["photo.jpg", "model", "config.json"])
def test_a_folder_of_something_else_is_no_run_directory(tmp_path: Path, config: TrainConfig, name: str) -> None:
    run = tmp_path / "pictures"
    (run / name).mkdir(parents=True)
    (run / ".hidden").touch()
    with pytest.raises(FileExistsError, match=rf"^output: {run} holds {name}, expected a run directory or an empty or"):
        loop.train(config, run, quiet=True)
    assert sorted(path.name for path in run.iterdir()) == [".hidden", name]


@pytest.mark.parametrize("left", [".recipe.yaml.partial", "checkpoints/", "recipe.yaml", None])
def test_a_run_that_was_cut_off_at_once_begins_again(tmp_path: Path, left: str | None) -> None:
    run, short = tmp_path / "run", tiny_recipe(tmp_path, "steps=1")
    run.mkdir()
    if left is not None:
        (run / left).mkdir() if left.endswith("/") else (run / left).touch()
    assert loop.train(short, run, quiet=True).is_dir()


def test_two_processes_cannot_train_in_one_directory(tmp_path: Path, config: TrainConfig) -> None:
    run = tmp_path / "run"
    with RunDirectory(run), pytest.raises(FileExistsError, match="another process trains"):
        loop.train(config, run, quiet=True)
    with RunDirectory(run):
        pass


def test_a_folder_that_cannot_be_locked_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that another process trains there, for which a user would look in vain."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match=rf"{os.strerror(errno.ENOLCK)} \(to lock it\): '{tmp_path / 'run'}'"):
        RunDirectory(tmp_path / "run").__enter__()


def test_all_folders_on_the_way_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, synced = files.sync, []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path) or honest(path))
    (tmp_path / "a").mkdir()
    with RunDirectory(tmp_path / "a" / "b" / "c" / "run"):
        assert set(synced) >= {tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"}


def test_leftovers_of_an_export_are_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in (".model.0a.partial", ".model.0b.old"):
        (run / name).mkdir(parents=True)
    (run / "recipe.yaml").touch()
    with RunDirectory(run):
        assert sorted(path.name for path in run.iterdir()) == [".model.0a.partial", ".model.0b.old", "recipe.yaml"]
        (run / "model").mkdir()
    with RunDirectory(run):
        assert sorted(path.name for path in run.iterdir()) == ["model", "recipe.yaml"]


# --- the log -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    ["", '{"step": 4', '{"step": 4}', '{"step": 4}\n', '\x00\x00\x00\n{"step": 3}\n', "3\n", '{"no": 1}\n'],
)
def test_a_log_is_cut_where_the_checkpoint_is(tmp_path: Path, end: str) -> None:
    path = tmp_path / "log.jsonl"
    kept = '{"step": 1}\n{"step": 3}\n{"step": 3, "event": "held_out"}\n'
    path.write_text(kept + end)
    with Log(path, 3) as log:
        log.write({"step": 4})
    assert path.read_text() == kept + '{"step": 4}\n'


def test_what_is_logged_is_on_the_disk_before_a_checkpoint_knows_of_it(tmp_path: Path, config: TrainConfig) -> None:
    """The power goes at any moment: the log that is left reaches as far as the checkpoint."""
    run = tmp_path / "run"
    with Disk(tmp_path) as disk:
        break_off(config, run, 10)
    disk.lose()
    saved = state_of(run, config).step
    assert saved == 9
    assert [line["step"] for line in lines(run)][-1] >= 8
    loop.train(config, run, quiet=True)
    assert torch.isfinite(torch.tensor(lines(run)[-1]["stage_loss"])).all()

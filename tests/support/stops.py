"""Stop training at random, again and again, and compare it bit for bit with a run that was never stopped.

``make stops`` is the long form: twenty stops for each of 0 and 2 workers, 1 and 2 ranks. A *chain* is one run
directory: trained, stopped, resumed and so forth, until the run ends. A seed determines what happens in it::

    told      SIGTERM or SIGINT to one rank, at a random call of a Python function after a step's beginning
    hurried   two SIGINTs, which end the run at once, whatever is in progress
    killed    SIGKILL of one rank, likewise
    saving    SIGKILL of one rank at a random operation of a save: a write, or anything else that changes the folder
    worker    SIGKILL of a process that reads images

After every stop, each complete checkpoint must have, by digest, the state that the whole run had at its step; every
batch, including the next one, must be that of the whole run; no saved step may be lost, and no process may be left
over.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.manifest import read_manifest, verify
from pixelflow_training.signals import EXIT_AT_ONCE, EXIT_STOPPED
from pixelflow_training.state import TrainState
from support.disk import Disk
from support.pictures import photograph_tiles
from support.ranks import FAILED, LOST, in_ranks, said
from support.recipes import tiny_recipe
from support.runs import digest, outcome, send

STEPS, EVERY = 16, 3
CALLS = 4000  # Python function calls, about as many as in a step
WRITES, OTHERS = 800, 60  # operations of a save, approximately
KILLED = -signal.SIGKILL
RECIPE = [
    "model.in_channels=3",
    "model.out_channels=3",
    "model.num_classes=3",
    "data.name=folder",
    "data.held_out=5",
    "data.augment={flip: true, rotate: 6.0}",
    f"steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "log_every=2",
    "eval_every=7",
]


class Stop(NamedTuple):
    """How a run is stopped.

    Attributes:
        kind: see the module's docstring; ``none`` lets it run to its end.
        rank: the rank that is affected.
        step: step, from 0, before which nothing happens.
        count: number of calls, or of operations of a save, after that.
        what: for ``told`` the signal's name; for ``saving`` which operations are counted.
    """

    kind: str
    rank: int = 0
    step: int = 0
    count: int = 0
    what: str = ""


def draw(generator: random.Random, kind: str, ranks: int, done: int) -> Stop:
    """Draw a stop of one kind, not long after the last saved step."""
    rank, step = generator.randrange(ranks), min(done + generator.randrange(EVERY + 2), STEPS - 1)
    if kind == "told":
        return Stop(kind, rank, step, generator.randrange(CALLS), generator.choice(["SIGTERM", "SIGINT"]))
    if kind == "saving":
        what = generator.choice(["write", "others"])
        return Stop(kind, rank, step, generator.randrange(WRITES if what == "write" else OTHERS), what)
    return Stop(kind, rank, step, generator.randrange(CALLS))


# --- inside a rank -----------------------------------------------------------------------------------------


def attempt(folder: Path, overrides: list[str], stop: Stop) -> None:
    """Train, record every batch, and be stopped; a target of :func:`in_ranks`."""
    rank = int(os.environ.get("RANK", "0"))
    os.environ["PIXELFLOW_STOPPED_RUN"] = str(folder)  # identifies the processes that it starts
    notes = os.open(folder / f"batches-{rank}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    honest = loop.training_batch
    mine = stop if rank == stop.rank else Stop("none")
    armed = False

    def watched(config: TrainConfig, data: Any, step: int, *share: int) -> Batch:
        nonlocal armed
        if step >= mine.step and not armed:
            armed = True
            arm(mine, folder / "run" / "checkpoints")
        batch = honest(config, data, step, *share)
        os.write(notes, f"{step} {bits(batch)}\n".encode())
        return batch

    loop.training_batch = watched
    recipe = folder / f"recipe-{rank}"
    recipe.mkdir(exist_ok=True)
    try:
        loop.train(tiny_recipe(recipe, *overrides), folder / "run", quiet=True)
    except KeyboardInterrupt:  # as the command line does
        os._exit(EXIT_AT_ONCE)


def arm(stop: Stop, checkpoints: Path) -> None:
    """Arrange for the stop to happen from now on."""
    if stop.kind == "saving":
        Disk(
            checkpoints, stop.count, "kill", counted=(lambda name: (name == "write") == (stop.what == "write"))
        ).__enter__()
    elif stop.kind != "none":
        at_call(stop.count, lambda: happen(stop))


def happen(stop: Stop) -> None:
    if stop.kind == "told":
        send(signal.Signals[stop.what])
    elif stop.kind == "hurried":
        send(signal.SIGINT)
        send(signal.SIGINT)
    elif stop.kind == "killed":
        send(signal.SIGKILL)
    elif workers := multiprocessing.active_children():
        os.kill(workers[stop.count % len(workers)].pid or 0, signal.SIGKILL)


def at_call(count: int, act: Callable[[], None]) -> None:
    """Call ``act`` at the ``count``-th call (from 0) of a Python function in this thread."""
    left = count

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        if event == "call":
            left -= 1
            if left < 0:
                sys.setprofile(None)
                act()

    assert threading.current_thread() is threading.main_thread()
    sys.setprofile(profile)


def bits(batch: Batch) -> str:
    """Return the SHA-256 of a batch: its tensors, grids and skipped images."""
    tensors = {
        name: getattr(batch, name) for name in ("tokens", "targets", "t_model", "labels", "latent_size", "stage")
    }
    found = f"{digest({'batch': tensors})} {batch.layout.grids} {batch.skipped}"
    return hashlib.sha256(found.encode()).hexdigest()


# --- the run that is never stopped -------------------------------------------------------------------------


class Whole(NamedTuple):
    """A run that was never stopped: its outcome, its state at every step, and every batch of every rank."""

    outcome: dict[str, Any]
    states: dict[int, str]
    batches: list[dict[int, str]]


def whole_run(folder: Path, recipe: list[str], ranks: int) -> Whole:
    """Train the whole run, without workers."""
    folder.mkdir()
    overrides = [*recipe, "data.workers=0", "checkpoint.every=1", f"checkpoint.keep={STEPS + 1}"]
    codes = in_ranks(ranks, folder, attempt, overrides, Stop("none"))
    assert codes == [0] * ranks, said(folder, 0)
    config = tiny_recipe(folder, *overrides)
    states = saved_states(folder / "run", config)
    assert sorted(states) == list(range(STEPS + 1))
    batches = [noted(folder, rank) for rank in range(ranks)]
    assert all(sorted(found) == list(range(STEPS)) for found in batches)
    return Whole(outcome(folder / "run", config), states, batches)


def noted(folder: Path, rank: int) -> dict[int, str]:
    """Return the batches that a rank recorded; a step that was repeated must have had the same batch."""
    found: dict[int, str] = {}
    for line in (folder / f"batches-{rank}.txt").read_text().splitlines():
        step, sha = line.split()
        assert found.setdefault(int(step), sha) == sha, f"rank {rank}: another batch for step {step} than before"
    return found


def saved_states(run: Path, config: TrainConfig) -> dict[int, str]:
    """Return the digest of every complete checkpoint by step, after verifying it; nothing is changed."""
    found = {}
    for path in sorted((run / "checkpoints").glob("step-*")):
        verify(path, manifest := read_manifest(path))
        tensors = TrainState(config, loop.build_model(config)).tensors()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about a single process
            load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
        found[manifest.step] = digest(tensors)
    return found


# --- chains ------------------------------------------------------------------------------------------------


def chains(
    folder: Path, whole: Whole, recipe: list[str], ranks: int, stops: int, generator: random.Random, say: Any = print
) -> int:
    """Stop a run ``stops`` times, over as many run directories as needed, and compare each with the whole run.

    Returns:
        How many stops ended a process before the run's end.
    """
    workers = "data.workers=0" not in recipe
    kinds: list[str] = []
    stopped, number = 0, 0
    for index in range(stops):
        chain = folder / f"chain-{number}"
        chain.mkdir(exist_ok=True)
        if not kinds:
            kinds = ["told", "hurried", "killed", "saving", "saving", *["worker"] * workers]
            generator.shuffle(kinds)
        stop = draw(generator, kinds.pop(), ranks, latest(chain))
        codes = go_on(chain, whole, recipe, ranks, stop)
        say(f"{index + 1}: {stop._asdict()} -> codes {codes}, step {latest(chain)}", flush=True)
        stopped += any(codes)
        if not any(codes):
            number += 1
        if (not any(codes) or index == stops - 1) and codes != [0] * ranks:
            codes = go_on(chain, whole, recipe, ranks, Stop("none"))
            assert codes == [0] * ranks, said(chain, 0)
        if codes == [0] * ranks:
            config = tiny_recipe(chain, *recipe)
            ours = outcome(chain / "run", config)
            for key in ("state", "log", "model"):  # recipes differ in what is free
                assert ours[key] == whole.outcome[key], f"{key} differs at the end of {chain}"
    return stopped


def go_on(chain: Path, whole: Whole, recipe: list[str], ranks: int, stop: Stop) -> list[int | None]:
    """Run the same command once more, and check everything that must hold afterwards."""
    before = latest(chain)
    codes = in_ranks(ranks, chain, attempt, recipe, stop)
    for rank, code in enumerate(codes):
        assert code in expected(stop, rank), f"{stop}: rank {rank} ended with {code}: {said(chain, rank)}"
    if stop.kind == "told" and not {*codes} <= {0, EXIT_STOPPED}:
        assert latest(chain) == STEPS, f"{stop}: ended with {codes} at step {latest(chain)}"
    nobody_left(chain)
    hold(chain, whole, recipe, stop)
    assert latest(chain) >= before, f"{stop}: step {before} was saved and is lost"
    return codes


def hold(chain: Path, whole: Whole, recipe: list[str], stop: Stop) -> None:
    """Compare the batches and checkpoints of a run with those of the whole one."""
    for rank, batches in enumerate(whole.batches):
        if (chain / f"batches-{rank}.txt").exists():
            for step, sha in noted(chain, rank).items():
                assert sha == batches[step], f"{stop}: rank {rank} had another batch for step {step}"
    if (chain / "run" / "checkpoints").exists():
        states = saved_states(chain / "run", tiny_recipe(chain, *recipe))
        for step, sha in states.items():
            assert sha == whole.states[step], f"{stop}: another state at step {step}"
        assert latest(chain) in (-1, *states), f"{stop}: latest names {latest(chain)}, there is {sorted(states)}"


def expected(stop: Stop, rank: int) -> set[int]:
    """Return the exit codes with which a rank may end. It is 0 if the run ends first; signal handlers are removed just
    before the end, when everything is saved.
    """
    mine = rank == stop.rank
    return {
        "none": {0},
        "told": {0, EXIT_STOPPED, -signal.SIGTERM if mine else LOST, EXIT_AT_ONCE if mine else LOST},
        "hurried": {0, EXIT_AT_ONCE if mine else LOST},
        "killed": {0, KILLED if mine else LOST},
        "saving": {0, KILLED if mine else LOST},
        "worker": {0, FAILED if mine else LOST},
    }[stop.kind]


def latest(chain: Path) -> int:
    """Return the step to resume from; -1 before the first."""
    pointer = chain / "run" / "checkpoints" / "latest"
    return int(pointer.read_text().split("-")[1]) if pointer.exists() else -1


def nobody_left(chain: Path) -> None:
    """Assert that all processes started for this run have ended, or end soon."""
    mark = f"PIXELFLOW_STOPPED_RUN={chain}".encode()
    deadline = time.monotonic() + 120
    while left := [process for process in Path("/proc").iterdir() if process.name.isdigit() and is_of(process, mark)]:
        assert time.monotonic() < deadline, f"left over: {[path.name for path in left]}"
        time.sleep(0.1)


def is_of(process: Path, mark: bytes) -> bool:
    with suppress(OSError):  # it has ended, or belongs to somebody else
        return mark in (process / "environ").read_bytes().split(b"\0")
    return False


def photographs(root: Path) -> list[str]:
    """Return a recipe's overrides for a folder of images, some of which are broken."""
    photograph_tiles(root, classes=3, each=8)
    for name in ("class 0/003.JPEG", "class 1/000.JPEG"):
        (root / name).write_bytes((root / name).read_bytes()[:500])
    return [*RECIPE, f"data.path={root}"]


def main() -> None:
    """Run the long form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=20, help="of each combination")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = photographs(folder / "images")
        for ranks in options.ranks:
            whole = whole_run(folder / f"whole-{ranks}", recipe, ranks)
            for workers in options.workers:
                place = folder / f"{workers}-{ranks}"
                place.mkdir()
                generator = random.Random(f"{options.seed} {workers} {ranks}")
                print(f"{workers} workers, {ranks} ranks", flush=True)
                count = chains(place, whole, [*recipe, f"data.workers={workers}"], ranks, options.stops, generator)
                print(f"{workers} workers, {ranks} ranks: {count} stops of {options.stops} cut the run, all the same")


if __name__ == "__main__":
    main()

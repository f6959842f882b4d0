"""What goes wrong, through the command: one line says what, and the same command goes on from the last checkpoint.

The command runs in processes forked off one that has imported torch, with faults that tests make.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pixelflow_engine.cli import main
from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.run import Log
from support.disk import Disk
from support.pictures import photograph_tiles
from support.ranks import in_ranks
from support.recipes import tiny_recipe
from support.runs import at_step, lines, outcome, send
from support.stops import nobody_left

OVERRIDES = ["steps=5", "checkpoint.every=2", "eval_every=5"]
FOLDER = ["model.in_channels=3", "model.out_channels=3", "model.num_classes=3", "data.name=folder", "data.held_out=4"]


def command(folder: Path, overrides: list[str], fault: Callable[[Path], None] | None = None, rank: int = 0) -> None:
    """For :func:`in_ranks`: ``pixelflow train``; what it says is in ``said-N.txt``; one rank has a fault."""
    me = int(os.environ.get("RANK", "0"))
    with (folder / f"said-{me}.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ["PIXELFLOW_STOPPED_RUN"] = str(folder)
    if fault and me == rank:
        fault(folder)
    recipe = str(folder / "tiny.yaml")
    sys.argv = ["pixelflow", "train", "--config", recipe, "--output", str(folder / "run"), "--quiet", *overrides]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def said(folder: Path, rank: int = 0) -> str:
    """What the command said in a rank, without the warnings of libraries."""
    text = (folder / f"said-{rank}.txt").read_text()
    assert "Traceback" not in text, text
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("pixelflow: "))


# --- faults ------------------------------------------------------------------------------------------------


def fill_disk(folder: Path) -> None:
    """No room for the checkpoint of step 4, in this process."""
    at_step(3, Disk(folder / "run" / "checkpoints" / ".step-00000004.partial", 0, "full").__enter__)


def fill_disk_late(folder: Path) -> None:
    """Room for what this rank computes, and none for the manifest."""
    full = Disk(folder / "run" / "checkpoints" / ".step-00000004.partial" / "manifest.json", 0, "full")
    at_step(3, full.__enter__)


def fill_disk_for_the_log(folder: Path) -> None:
    """Room for three lines of it."""
    Disk(folder / "run" / "log.jsonl", 3, "full").__enter__()


def poison(folder: Path) -> None:
    """Batches from step 3 on have a target that is not finite."""
    honest = loop.training_batch

    def poisoned(config: TrainConfig, data: Any, step: int, *share: int) -> Batch:
        batch = honest(config, data, step, *share)
        if step >= 3:
            batch.targets[0, 0] = math.nan
        return batch

    loop.training_batch = poisoned


def die(folder: Path) -> None:
    at_step(3, lambda: send(signal.SIGKILL))


def saved(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def goes_on(folder: Path, ranks: int, overrides: list[str], whole: Path) -> None:
    """Without the fault the same command ends as a run that never had one."""
    assert in_ranks(ranks, folder, command, overrides) == [0] * ranks, (folder / "said-0.txt").read_text()
    config = tiny_recipe(folder, *overrides)
    assert outcome(folder / "run", config) == outcome(whole / "run", config)


@pytest.fixture(scope="module", params=[1, 2])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One process or two, and the run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_recipe(folder)
    assert in_ranks(request.param, folder, command, OVERRIDES) == [0] * request.param, said(folder)
    return request.param, folder


NO_ROOM = "[Errno 28] No space left on device; the last one is step-00000002\n"


def test_a_full_disk(whole: tuple[int, Path], tmp_path: Path) -> None:
    """On the last rank alone, of the only one there is; all say whose it is."""
    ranks, never = whole
    tiny_recipe(tmp_path)
    assert in_ranks(ranks, tmp_path, command, OVERRIDES, fill_disk, ranks - 1) == [2] * ranks
    where = "rank 1: " if ranks == 2 else ""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    for rank in range(ranks):
        assert said(tmp_path, rank) == f"pixelflow: {checkpoint}: the checkpoint could not be saved: {where}{NO_ROOM}"
    assert saved(tmp_path / "run") == "step-00000002"
    assert not list((tmp_path / "run" / "checkpoints").glob(".step*")), "half a checkpoint takes the room of the next"
    goes_on(tmp_path, ranks, OVERRIDES, never)


def test_no_room_for_the_manifest_is_told_by_all(tmp_path: Path) -> None:
    """Which the first rank alone writes."""
    tiny_recipe(tmp_path)
    assert in_ranks(2, tmp_path, command, OVERRIDES, fill_disk_late) == [2, 2]
    for rank in (0, 1):
        assert said(tmp_path, rank).endswith(NO_ROOM)
    assert saved(tmp_path / "run") == "step-00000002"


def test_no_room_for_the_log(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    assert in_ranks(1, tmp_path, command, OVERRIDES, fill_disk_for_the_log) == [2]
    log = tmp_path / "run" / "log.jsonl"
    assert said(tmp_path) == f"pixelflow: [Errno 28] No space left on device: '{log}'\n"
    assert saved(tmp_path / "run") == "step-00000002"
    assert len(lines(tmp_path / "run")) == 3


def test_a_log_that_finds_no_room_is_named_though_it_is_closed_too(tmp_path: Path) -> None:
    """By the device that is always full, which refuses what was kept for it once more when it is closed."""
    log = Log(tmp_path / "log.jsonl", 0)
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115 - the log closes it
    with pytest.raises(OSError, match=r"log\.jsonl"), log:
        log.write({"event": "train", "step": 1})


def test_batches_that_are_not_finite_on_one_rank(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    assert in_ranks(2, tmp_path, command, [*OVERRIDES, "guard.max_skipped=1"], poison, 1) == [2, 2]
    for rank in (0, 1):
        assert said(tmp_path, rank) == (
            "pixelflow: step 5: the loss or the gradient was not finite for 2 steps in a row, and guard.max_skipped is "
            f"1; their samples are in {tmp_path / 'run' / 'nonfinite.json'}\n"
        )
    assert saved(tmp_path / "run") == "step-00000004"


def test_a_flipped_bit_in_what_the_second_rank_wrote(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    overrides = [*OVERRIDES, "optimizer.schedule=constant"]
    assert in_ranks(2, tmp_path, command, [*overrides, "steps=3"]) == [0, 0], said(tmp_path)
    victim = tmp_path / "run" / "checkpoints" / "step-00000003" / "__1_0.distcp"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 16
    victim.write_bytes(data)
    assert in_ranks(2, tmp_path, command, [*overrides, "steps=4"]) == [2, 2]
    for rank in (0, 1):
        assert said(tmp_path, rank).startswith(f"pixelflow: {victim}: not what was written: SHA-256 ")
        assert said(tmp_path, rank).endswith("to resume from another checkpoint, pass --from-step (there is: 2)\n")


def test_a_rank_that_dies(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    assert in_ranks(2, tmp_path, command, OVERRIDES, die, 1) == [2, -signal.SIGKILL]
    assert said(tmp_path).startswith(
        "pixelflow: rank 0: another of the 2 ranks has ended or does not answer; the same "
    )
    assert saved(tmp_path / "run") in ("step-00000000", "step-00000002")  # the latter may have been under way


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """One is skipped by name; more than the recipe tolerates end the run, which keeps its checkpoint."""
    photograph_tiles(tmp_path / "images", classes=3, each=4)
    for name in ("class 0/001.JPEG", "class 2/002.JPEG"):
        (tmp_path / "images" / name).write_bytes(b"not an image")
    tiny_recipe(tmp_path)
    overrides = [*OVERRIDES, *FOLDER, f"data.path={tmp_path / 'images'}"]
    assert in_ranks(1, tmp_path, command, [*overrides, "data.max_skipped=1"]) == [2]
    assert said(tmp_path).startswith("pixelflow: step ")
    assert ": 2 images could not be read, and data.max_skipped is 1; the last are " in said(tmp_path)
    assert saved(tmp_path / "run").startswith("step-")
    assert in_ranks(1, tmp_path, command, overrides) == [0], said(tmp_path)
    skipped = {line["name"]: line["reason"] for line in lines(tmp_path / "run") if line["event"] == "skipped_image"}
    assert skipped == dict.fromkeys(("class 0/001.JPEG", "class 2/002.JPEG"), "not a JPEG, PNG, WebP or BMP image")


# --- workers -----------------------------------------------------------------------------------------------


def die_at_once(folder: Path) -> None:
    """Workers are just being started, and have not imported torch."""
    at_step(0, lambda: send(signal.SIGKILL))


@pytest.mark.parametrize("fault", [die_at_once, die], ids=["coming up", "at work"])
def test_workers_end_with_a_trainer_that_was_killed(fault: Callable[[Path], None], tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    assert in_ranks(1, tmp_path, command, [*OVERRIDES, "data.workers=1"], fault) == [-signal.SIGKILL]
    nobody_left(tmp_path)

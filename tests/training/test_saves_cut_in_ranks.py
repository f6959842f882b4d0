"""A save of two ranks, cut at every operation of either: a complete checkpoint always remains, and nobody hangs.

One pair of processes goes through all cuts. Where a rank is cut, its disk is dead from there on, and the other goes on
as it would without it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pixelflow_training.checkpoint import Checkpointer, name_of
from pixelflow_training.config import TrainConfig
from pixelflow_training.manifest import read_manifest, verify
from pixelflow_training.ranks import Ranks, join
from support.disk import Disk, PowerCut
from support.packs import FUZZ
from support.ranks import in_ranks, said
from support.recipes import tiny_recipe


class PairState:
    """As much of a state as two ranks need to write a file each."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.weight, self.moment = torch.full((4, 3), float(step)), torch.full((4, 3), -float(step))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            "model": {"weight": self.weight},
            "optimizer": {"moment": self.moment},
            "counters": {"step": torch.tensor(self.step)},
        }

    def take_counters(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.step = int(tensors["counters"]["step"])


def save(folder: Path, config: TrainConfig, ranks: Ranks, *steps: int) -> None:
    with Checkpointer(folder, config, ranks) as checkpoints:
        for step in steps:
            checkpoints.save(PairState(step))  # type: ignore[arg-type]


def cut_everywhere(top: Path) -> None:
    """For :func:`in_ranks`: each rank is cut at each of its operations in turn; what was left is in ``seen.json``."""
    me = int(os.environ["RANK"])
    recipe = top / f"recipe-{me}"
    recipe.mkdir()
    config = tiny_recipe(recipe)
    run, base, folder = top / "run", top / "base", top / "run" / "checkpoints"
    with join(config) as ranks:

        def begin() -> None:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(base, run)

        if ranks.first:
            run.mkdir()
        dist.barrier(ranks.control)
        save(folder, config, ranks, 1, 2)
        if ranks.first:
            shutil.copytree(run, base)
        with Checkpointer(folder, config, ranks) as checkpoints, Disk(run) as disk:
            checkpoints.save(PairState(3))  # type: ignore[arg-type]
            checkpoints.wait()
        operations = gathered(ranks, disk.names)
        if ranks.first:
            (top / "operations.json").write_text(json.dumps(operations))
        seen: Counter[int] = Counter()
        for victim, names in enumerate(operations):
            for cut, name in enumerate(names):
                if name == "write" and cut % 3 and FUZZ == 1:  # most of them are alike
                    continue
                ranks.first_does(begin)
                with (
                    Checkpointer(folder, config, ranks) as checkpoints,
                    Disk(run, cut if victim == me else None) as disk,
                    suppress(PowerCut, RuntimeError, OSError),  # in the rank that has the cut, and in the other
                ):
                    checkpoints.save(PairState(3))  # type: ignore[arg-type]
                    checkpoints.wait()
                assert victim != me or disk.dead, f"rank {me} was not cut at {cut}"
                dist.barrier(ranks.control)
                for path in folder.glob("step-*"):
                    verify(path, read_manifest(path))
                dist.barrier(ranks.control)
                state = PairState()
                with Checkpointer(folder, config, ranks) as checkpoints:
                    assert checkpoints.restore(state), f"rank {victim} cut at {cut}"  # type: ignore[arg-type]
                assert state.step in (2, 3), f"rank {victim} cut at {cut}"
                assert torch.equal(state.weight, PairState(state.step).weight)
                assert torch.equal(state.moment, PairState(state.step).moment)
                assert (folder / "latest").read_text() == f"{name_of(state.step)}\n"
                seen[state.step] += 1
                dist.barrier(ranks.control)
        if ranks.first:
            (top / "seen.json").write_text(json.dumps(seen))


def gathered(ranks: Ranks, mine: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(found, mine, group=ranks.control)
    return found


def test_cut_at_any_operation_of_either_rank_a_valid_checkpoint_remains(tmp_path: Path) -> None:
    assert in_ranks(2, tmp_path, cut_everywhere) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    first, second = json.loads((tmp_path / "operations.json").read_text())
    assert {"open", "write", "fsync", "rename", "replace", "unlink", "rmdir"} <= set(first)
    assert {"open", "write", "fsync"} <= set(second), "the second rank writes nothing"
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert sum(seen.values()) >= (len(first) + len(second)) // 3
    assert set(seen) == {"2", "3"}

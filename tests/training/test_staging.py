"""What ranks copy for a checkpoint: together everything, once; and a copy that training cannot reach any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem

from pixelflow_training import loop
from pixelflow_training.checkpoint import Checkpointer
from pixelflow_training.ranks import ALONE, Ranks
from pixelflow_training.staging import Stager, Tensors, share
from pixelflow_training.state import TrainState
from support.recipes import tiny_recipe
from support.runs import digest


def ranks_of(count: int) -> list[Ranks]:
    """So many, of which none can be reached: who writes what is agreed upon without a word."""
    return [Ranks(rank, count, torch.device("cpu"), control=cast("Any", object())) for rank in range(count)]


def named(tensors: Tensors) -> list[tuple[str, str]]:
    return [(group, name) for group, members in tensors.items() for name in members]


def size(tensors: Tensors) -> int:
    return sum(tensor.nbytes for members in tensors.values() for tensor in members.values())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_together_ranks_copy_everything_once_and_none_much_more_than_its_part(count: int, tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "model.depth=2")
    tensors = TrainState(config, loop.build_model(config)).tensors()
    shares = [share(tensors, ranks) for ranks in ranks_of(count)]
    assert sorted(key for mine in shares for key in named(mine)) == sorted(named(tensors))
    largest = max(tensor.nbytes for members in tensors.values() for tensor in members.values())
    assert max(map(size, shares)) - min(map(size, shares)) <= largest
    assert all(mine[group][name] is tensors[group][name] for mine in shares for group, name in named(mine))


def test_weights_and_biases_in_turns_are_not_dealt_out_in_turns() -> None:
    """With two ranks, every second tensor would be all of the weights."""
    tensors = {"model": {f"{i}.{kind}": torch.zeros(n) for i in range(4) for kind, n in (("weight", 900), ("bias", 3))}}
    assert [size(share(tensors, ranks)) for ranks in ranks_of(2)] == [4 * (2 * 900 + 2 * 3)] * 2


def test_more_ranks_than_tensors_leave_some_without(tmp_path: Path) -> None:
    tensors = {"model": {"weight": torch.ones(5)}, "counters": {"step": torch.tensor(3)}}
    assert [named(share(tensors, ranks)) for ranks in ranks_of(3)] == [
        [("model", "weight")],
        [("counters", "step")],
        [],
    ]


def test_alone_it_is_everything() -> None:
    tensors = {"model": {"weight": torch.ones(5)}}
    assert share(tensors, ALONE) is tensors


def test_a_copy_stays_what_it_was() -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    tensors: dict[str, dict[str, Tensor]] = {
        "model": {
            "rows": wide[1:3],
            "columns": wide[:, 2:4],
            "turned": wide.t(),
            "leaf": wide.clone().requires_grad_(),
        },
        "counters": {"step": torch.tensor(7), "none": torch.zeros(0, 3)},
    }
    before = digest({group: {k: t.detach().clone() for k, t in m.items()} for group, m in tensors.items()})
    stager = Stager()
    copy = stager.stage(tensors)
    assert digest(copy) == before
    assert not any(tensor.requires_grad for members in copy.values() for tensor in members.values())
    wide.fill_(-1)
    tensors["counters"]["step"].fill_(8)
    assert digest(copy) == before
    assert digest(stager.stage(tensors)) != before
    assert digest(copy) == before, "one copy is another's memory"


def test_the_writer_does_not_wait_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one, torch copies ahead on the stream that trains, and waits for it again and again."""
    config = tiny_recipe(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", lambda *_, **__: pytest.fail("waits for the GPU"))
    with Checkpointer(tmp_path / "checkpoints", config) as checkpoints:
        checkpoints.save(TrainState(config, loop.build_model(config)))
        checkpoints.wait()
        assert checkpoints.steps() == [0]


@pytest.mark.gpu
def test_on_a_gpu_the_copy_is_pinned_kept_and_whole() -> None:
    tensors = {"model": {f"{i}": torch.zeros(1 << 20, device="cuda") for i in range(64)}}
    stager = Stager()
    places = []
    for turn in (1, 2):
        for i, tensor in enumerate(tensors["model"].values()):
            tensor.fill_(100 * turn + i)
        copy = stager.stage(tensors)
        for tensor in tensors["model"].values():
            tensor.fill_(-1)
        for i in reversed(range(64)):  # the last to arrive first
            assert torch.equal(copy["model"][f"{i}"], torch.full((1 << 20,), 100.0 * turn + i))
            assert copy["model"][f"{i}"].is_pinned()
        places.append([tensor.data_ptr() for tensor in copy["model"].values()])
    assert places[0] == places[1]

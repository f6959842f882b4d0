"""In which order ranks' gradients add up: three or more round by it, so it must not depend on how old a process is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from pixelflow_training.config import TrainConfig
from pixelflow_training.ranks import Ranks, join
from pixelflow_training.step import TrainStep
from support.ranks import in_ranks, said
from support.recipes import tiny_recipe
from support.steps import batch_of, bits, random_state

STEPS, RANKS = 3, 3


def train_in_one_process_and_in_many(folder: Path) -> None:
    """For :func:`in_ranks`: the same steps by one step object, and each by one of its own, as in a new process."""
    recipe = folder / os.environ["RANK"]
    config = tiny_recipe(recipe, "batch_size=9", "compute.max_tokens=64")
    with join(config) as ranks:
        check_the_beginning(tiny_recipe(recipe, "compute.compile=true"), ranks)
        for name, many in (("one", False), ("many", True)):
            state = random_state(config, ranks)
            step = TrainStep(state, config, ranks)
            for i in range(STEPS):
                step = TrainStep(state, config, ranks) if many else step
                assert step(batch_of(config, i, ranks.rank, RANKS), 1e-3, parts=2).finite
            (folder / f"{name}-{ranks.rank}.txt").write_text(hashlib.sha256(b"".join(bits(state))).hexdigest())


def check_the_beginning(config: TrainConfig, ranks: Ranks) -> None:
    """Of what settles the order nothing is left."""
    state = random_state(config, ranks)
    before, drawn = bits(state), torch.random.get_rng_state()
    step = TrainStep(state, config, ranks)
    assert bits(state) == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert not torch._dynamo.utils.counters["stats"], "a graph was compiled that no step needs"


def test_three_ranks_go_on_with_the_bits_of_ranks_that_never_stopped(tmp_path: Path) -> None:
    """Level B. Two ranks would show nothing: a + b is b + a."""
    for rank in range(RANKS):
        (tmp_path / str(rank)).mkdir()
    assert in_ranks(RANKS, tmp_path, train_in_one_process_and_in_many) == [0] * RANKS, said(tmp_path, 0)
    found = [(tmp_path / f"{name}-{rank}.txt").read_text() for name in ("one", "many") for rank in range(RANKS)]
    assert found == found[:1] * len(found)

"""Stopped at random, again and again, runs end as if they never were. The long form is ``make stops``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.packs import FUZZ
from support.stops import STEPS, Stop, chains, hold, photographs, whole_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return photographs(tmp_path_factory.mktemp("stops") / "images")


@pytest.mark.parametrize(("ranks", "workers", "stops"), [(1, 1, 1), (2, 1, 3)])
def test_a_run_that_is_stopped_at_random_is_the_one_that_was_not(
    ranks: int, workers: int, stops: int, recipe: list[str], tmp_path: Path
) -> None:
    seed = 84 if FUZZ == 1 else random.randrange(2**32)
    print(f"seed {seed}")
    whole = whole_run(tmp_path / "whole", recipe, ranks)
    overrides = [*recipe, f"data.workers={workers}"]
    count = chains(tmp_path, whole, overrides, ranks, stops * FUZZ, random.Random(seed))
    assert FUZZ > 1 or count == stops, "a stop came too late"

    # That it would be noticed: another state, another batch.
    chain = tmp_path / "chain-0"
    with pytest.raises(AssertionError, match=f"another state at step {STEPS}"):
        hold(chain, whole._replace(states={**whole.states, STEPS: "another"}), overrides, Stop("none"))
    batches = [{**found, STEPS - 1: "another"} for found in whole.batches]
    with pytest.raises(AssertionError, match=f"rank 0 had another batch for step {STEPS - 1}"):
        hold(chain, whole._replace(batches=batches), overrides, Stop("none"))

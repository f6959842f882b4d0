"""The plan of a step: pure functions of the recipe and the step, whoever shares the work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixelflow_training.config import TrainConfig, load_config
from pixelflow_training.plan import Plan, plan_held_out, plan_step
from support.recipes import tiny_recipe

FIELDS = [field.name for field in fields(Plan)]
Make = Callable[..., TrainConfig]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    return lambda *overrides: tiny_recipe(tmp_path, *overrides)


def images(plan: Plan) -> dict[int, tuple[object, ...]]:
    """Everything about each image, by its position."""
    return {
        int(position): tuple(getattr(plan, name)[i].tolist() for name in FIELDS)
        for i, position in enumerate(plan.position)
    }


def counts(stage: Tensor, num_stages: int) -> tuple[int, ...]:
    return tuple(torch.bincount(stage, minlength=num_stages).tolist())


def steps(config: TrainConfig, count: int, dataset_size: int = 100) -> dict[str, Tensor]:
    """What the first steps draw, by position."""
    plans = [plan_step(config, step, dataset_size) for step in range(count)]
    order = torch.cat([plan.position for plan in plans]).argsort()
    return {name: torch.cat([getattr(plan, name) for plan in plans])[order] for name in FIELDS}


# --- what a step is ----------------------------------------------------------------------------------------


def test_steps_cover_the_positions_in_turn(recipe: Make) -> None:
    for step in (0, 1, 10**9):
        plan = plan_step(recipe("batch_size=7"), step, 10)
        assert sorted(plan.position.tolist()) == list(range(7 * step, 7 * step + 7))


def test_the_pack_begins_with_full_resolution(recipe: Make) -> None:
    plan = plan_step(recipe("batch_size=11"), 3, 50)
    order = list(zip((-plan.stage).tolist(), plan.position.tolist(), strict=True))
    assert order == sorted(order)


def test_shapes_and_types(recipe: Make) -> None:
    config = recipe("batch_size=7", "data.augment.flip=true")
    for plan in (plan_step(config, 2, 30), plan_held_out(config, 7)):
        assert len(plan) == 7
        shapes = {name: tuple(getattr(plan, name).shape) for name in FIELDS}
        assert shapes == dict.fromkeys(FIELDS, (7,)) | {"affine": (7, 4), "crop": (7, 2)}
        assert {getattr(plan, name).dtype for name in ("position", "sample", "stage", "time", "noise_seed")} == {
            torch.int64
        }
        assert plan.drop.dtype == plan.flip.dtype == torch.bool
        assert plan.affine.dtype == plan.crop.dtype == torch.float64


def test_a_plan_is_a_pure_function_of_recipe_and_step(recipe: Make) -> None:
    stream = torch.get_rng_state()
    config = recipe()
    late = images(plan_step(config, 7, 50))
    plan_step(config, 3, 50)
    assert images(plan_step(config, 7, 50)) == late
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"


def test_another_seed_changes_every_draw(recipe: Make) -> None:
    ours, theirs = (steps(recipe("label_drop=0.5", "data.augment.flip=true", f"seed={s}"), 4) for s in (0, 1))
    for name in FIELDS:
        assert torch.equal(ours[name], theirs[name]) == (name == "position"), name


@pytest.mark.parametrize("other", [5, 12, 60])
def test_the_batch_size_changes_nothing_but_stages(other: int, recipe: Make) -> None:
    """A sample's draws belong to its position; only the balance of stages belongs to the step."""
    ours = steps(recipe("batch_size=10"), 6)
    theirs = steps(recipe(f"batch_size={other}"), 60 // other)
    for name in FIELDS:
        assert torch.equal(ours[name], theirs[name]) == (name != "stage"), name


# --- shares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [1, 3, 4])
@pytest.mark.parametrize("batch_size", [8, 13])
def test_shares_are_the_step_whatever_their_number(batch_size: int, num_stages: int, recipe: Make) -> None:
    config = recipe(f"batch_size={batch_size}", f"scheduler.num_stages={num_stages}", "resolution=128")
    for make in (lambda *share: plan_step(config, 5, 40, *share), lambda *share: plan_held_out(config, 37, *share)):
        whole = images(make())
        for world_size in (1, 2, 3, batch_size):
            shares = [make(rank, world_size) for rank in range(world_size)]
            union = [image for share in shares for image in images(share).items()]
            assert len(union) == len(whole), "an image is in two shares"
            assert dict(union) == whole
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            for of_stage in zip(*(counts(share.stage, num_stages) for share in shares), strict=True):
                assert max(of_stage) - min(of_stage) <= 1, f"{world_size} ranks: {of_stage}"


def pack_shapes(config: TrainConfig, world_size: int) -> set[tuple[int, ...]]:
    """How many images of each stage the packs of sixty steps have."""
    S = config.scheduler.num_stages
    return {
        counts(plan_step(config, step, 99, rank, world_size).stage, S)
        for step in range(60)
        for rank in range(world_size)
    }


@pytest.mark.parametrize("name", ["digits", "digits-two-minutes"])
def test_the_packs_of_a_recipe_have_one_shape(name: str) -> None:
    config = load_config(name)
    share = config.batch_size // config.scheduler.num_stages
    for world_size in (1, 2):
        assert pack_shapes(config, world_size) == {(share // world_size,) * config.scheduler.num_stages}


@pytest.mark.parametrize(("batch_size", "num_stages"), [(8, 4), (9, 4), (10, 4), (11, 4), (8, 3), (13, 2), (5, 1)])
def test_the_shapes_of_packs_are_finitely_many(batch_size: int, num_stages: int, recipe: Make) -> None:
    """One for each remainder by which steps can begin: a single one where the stages divide the batch."""
    config = recipe(f"batch_size={batch_size}", f"scheduler.num_stages={num_stages}", "resolution=128")
    common = math.gcd(batch_size, num_stages)
    expected = {
        counts(torch.arange(first, first + batch_size) % num_stages, num_stages)
        for first in range(0, num_stages, common)
    }
    assert pack_shapes(config, 1) == expected
    assert len(expected) == num_stages // common
    if batch_size % (2 * num_stages) == 0:
        assert len(pack_shapes(config, 2)) == 1


# --- what is drawn -----------------------------------------------------------------------------------------


def test_draws_have_their_laws_and_are_independent(recipe: Make) -> None:
    n = 8000
    config = recipe(
        f"batch_size={n}", "label_drop=0.1", "data.augment.flip=true", "scheduler.num_stages=3", "resolution=32"
    )
    plan = plan_step(config, 1, n)
    assert Counter(plan.sample.tolist()).most_common(1)[0][1] == 1, "an epoch shows an image twice"
    assert (plan.time.min().item(), plan.time.max().item()) == (0, 999)
    columns = {
        "sample": plan.sample / n,
        "stage": plan.stage,
        "time": plan.time / 1000,
        "drop": plan.drop,
        "flip": plan.flip,
        "noise": (plan.noise_seed >> 11).double() / 2**53 + 0.5,
        "noise, low": (plan.noise_seed & 0xFFFFF) / 2**20,
    }
    columns |= {f"affine {i}": (x + 1) / 2 for i, x in enumerate(plan.affine.unbind(1))}
    columns |= {f"crop {i}": x for i, x in enumerate(plan.crop.unbind(1))}
    table = torch.stack([x.double() for x in columns.values()])
    for name, x in columns.items():
        x = x.double()
        mean = {"drop": 0.1, "stage": 1.0}.get(name, 0.5)
        variance = {"drop": 0.09, "flip": 0.25, "stage": 2 / 3}.get(name, 1 / 12)
        assert abs(x.mean().item() - mean) < 5 * math.sqrt(variance / n), name
        assert abs(x.var().item() - variance) < 6 * variance / math.sqrt(n) + 5 * math.sqrt(variance / n) * (
            name == "drop"
        )
        if name not in ("drop", "flip", "stage"):
            assert 0 <= x.min() < 0.005
            assert 0.995 < x.max() < 1
    correlations = torch.corrcoef(table) - torch.eye(len(table), dtype=torch.float64)
    assert correlations.abs().max() < 5 / math.sqrt(n)
    assert len(set(plan.noise_seed.tolist())) == n


def test_times_are_those_of_the_recipes_grid(recipe: Make) -> None:
    times = steps(recipe("scheduler.num_train_timesteps=3", "batch_size=40"), 3)["time"]
    assert set(times.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_certain_drops(rate: float, recipe: Make) -> None:
    assert set(steps(recipe(f"label_drop={rate}"), 20)["drop"].tolist()) == {rate == 1.0}


def test_nothing_is_mirrored_unless_asked_for(recipe: Make) -> None:
    plain, mirrored = steps(recipe(), 20), steps(recipe("data.augment.flip=true"), 20)
    assert not plain["flip"].any()
    assert mirrored["flip"].any()
    for name in FIELDS:
        assert name == "flip" or torch.equal(plain[name], mirrored[name]), name


# --- held-out images ---------------------------------------------------------------------------------------


def test_held_out_images_are_seen_as_they_are(recipe: Make) -> None:
    plan = plan_held_out(recipe("label_drop=1.0", "data.augment.flip=true"), 50)
    assert sorted(plan.sample.tolist()) == list(range(50))
    assert not plan.drop.any()
    assert not plan.flip.any()
    assert not plan.affine.any()


def test_held_out_draws_are_their_own_and_never_change(recipe: Make) -> None:
    config = recipe("batch_size=10")
    held_out, trained = images(plan_held_out(config, 50)), steps(config, 5)
    for changed in ("batch_size=20", "steps=77", "label_drop=0.7"):
        assert images(plan_held_out(recipe(changed), 50)) == held_out
    assert images(plan_held_out(recipe("seed=1"), 50)) != held_out
    plan = plan_held_out(config, 50)
    order = plan.position.argsort()
    assert not set(plan.noise_seed.tolist()) & set(trained["noise_seed"].tolist())
    assert (plan.time[order] == trained["time"]).sum() < 5


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1, 10), r"step: got -1, expected 0 or more"),
        ((0, 0), r"dataset_size: got 0, expected 1 or more"),
        ((0, 10, 2, 2), r"rank: got 2, expected 0 to 1"),
        ((0, 10, -1, 2), r"rank: got -1, expected 0 to 1"),
        ((0, 10, 0, 0), r"world_size: got 0, expected 1 to 8"),
        ((0, 10, 0, 9), r"world_size: got 9, expected 1 to 8"),
    ],
)
def test_a_number_out_of_range_is_named(arguments: tuple[int, ...], said: str, recipe: Make) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        plan_step(recipe(), *arguments)

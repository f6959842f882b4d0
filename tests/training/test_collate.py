"""A packed batch, image by image, against the training pair of the reference, and as a function of its plan."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

from pixelflow_engine.config import PixelFlowConfig
from pixelflow_engine.reference import Stage, make_stages, training_pair
from pixelflow_kernels import philox
from pixelflow_kernels.cascade.reference import block_normals, from_blocks
from pixelflow_kernels.philox import TRAINING
from pixelflow_training.collate import Batch, make_batch
from pixelflow_training.plan import Plan
from support.engines import tiny_config
from support.reference_models import seeded

U = 2.0**-24
"""Half a unit in the last place of float32 at 1."""


def make_plan(config: PixelFlowConfig, count: int, seed: int, **given: Tensor) -> Plan:
    """A plan of the images 0 to count - 1, every stage among them where there are enough, drawn by torch."""
    draws, S = seeded(seed), config.scheduler.num_stages
    stage = (torch.arange(count) % S).sort(descending=True).values
    drawn = {
        "position": torch.arange(count),
        "sample": torch.arange(count),
        "stage": stage,
        "time": torch.randint(0, config.scheduler.num_train_timesteps, (count,), generator=draws),
        "drop": torch.zeros(count, dtype=torch.bool),
        "flip": torch.zeros(count, dtype=torch.bool),
        "affine": torch.rand(count, 4, generator=draws, dtype=torch.float64),
        "crop": torch.rand(count, 2, generator=draws, dtype=torch.float64),
        "noise_seed": torch.randint(-(2**63), 2**63 - 1, (count,), generator=draws),
    }
    return Plan(**(drawn | given))


def subset(plan: Plan, chosen: Tensor) -> Plan:
    return Plan(**{field.name: getattr(plan, field.name)[chosen] for field in fields(plan)})


def noise(plan: Plan, i: int, shape: tuple[int, int, int]) -> Tensor:
    """The normals of the i-th image: those of the operation, whose own tests hold them against double precision."""
    return from_blocks(block_normals(plan.noise_seed[i : i + 1], int(plan.stage[i]), shape, TRAINING))[0]


def pictures(batch: Batch, x: Tensor, p: int) -> list[Tensor]:
    """Packed patches as images ``[c, h, w]``, put together by loops."""
    found, first = [], 0
    for rows, columns in batch.layout.grids:
        c = x.shape[1] // p**2
        image = torch.full((c, rows * p, columns * p), math.nan)
        for n in range(rows * columns):
            top, left = n // columns * p, n % columns * p
            image[:, top : top + p, left : left + p] = x[first + n].reshape(c, p, p)
        found.append(image)
        first += rows * columns
    return found


def dyadic(count: int, config: PixelFlowConfig, seed: int, height: int, width: int) -> Tensor:
    """Images of multiples of 2^-7 in [-1, 1]: no sum of a halving rounds, in whatever order it is taken."""
    shape = (count, config.model.in_channels, height, width)
    return torch.randint(-128, 129, shape, generator=seeded(seed)).float() / 128


CASES: list[dict[str, Any]] = [
    {},
    {"num_stages": 1, "resolution": 8},
    {"num_stages": 2, "resolution": 24, "patch_size": 4},
    {"num_stages": 4, "resolution": 32, "in_channels": 1, "out_channels": 1},
    {"num_stages": 2, "resolution": 4, "patch_size": 1, "in_channels": 2, "out_channels": 2},
    {"num_stages": 2, "resolution": 12, "patch_size": 6},
]
NAMES = [",".join(f"{k}={v}" for k, v in case.items()) or "plain" for case in CASES]


def reference_pair(
    image: Tensor, plan: Plan, i: int, stages: list[Stage], shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, float]:
    """The pair of the i-th image, given what the plan says about it."""
    image = image.flip(-1) if plan.flip[i] else image
    eps = noise(plan, i, shape).to(image.dtype)
    return training_pair(image, stages[int(plan.stage[i])], len(stages), int(plan.time[i]), eps)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("count", [5, 12])
def test_a_batch_is_the_references_training_pairs_bit_for_bit(case: dict[str, Any], count: int) -> None:
    """In float32, of float32 images whose halvings are exact: the reference's own expressions, no bit apart."""
    config = tiny_config(**case)
    R, p, S = config.resolution, config.model.patch_size, config.scheduler.num_stages
    flip = torch.arange(count) % 3 == 0
    plan = make_plan(config, count, 40 + count, flip=flip)
    images = dyadic(count, config, 41 + count, R, 2 * R)  # not square, so that axes cannot be mixed up
    batch = make_batch(images, torch.arange(count), plan, config)
    stages = make_stages(S)
    got_x, got_target = pictures(batch, batch.tokens, p), pictures(batch, batch.targets, p)
    for i in range(count):
        shape = tuple(got_x[i].shape)
        x_tau, target, t_model = reference_pair(images[i], plan, i, stages, shape)  # type: ignore[arg-type]
        assert torch.equal(got_x[i], x_tau), i
        assert torch.equal(got_target[i], target), i
        assert batch.t_model[i] == torch.tensor(t_model, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_bytes_are_pairs_of_their_signed_values(case: dict[str, Any]) -> None:
    config, count = tiny_config(**case), 9
    R, p, S = config.resolution, config.model.patch_size, config.scheduler.num_stages
    plan = make_plan(config, count, 50)
    images = torch.randint(0, 256, (count, config.model.in_channels, R, R), generator=seeded(51), dtype=torch.uint8)
    batch = make_batch(images, torch.arange(count), plan, config)
    got_x, got_target = pictures(batch, batch.tokens, p), pictures(batch, batch.targets, p)
    for i in range(count):
        image, shape = images[i].double() / 127.5 - 1, tuple(got_x[i].shape)
        x_tau, target, _ = reference_pair(image, plan, i, make_stages(S), shape)  # type: ignore[arg-type]
        # Two roundings to [-1, 1], four a halving, and eight of a pair's values, which stay below 1 + |eps| < 6.8.
        tolerance = (2 + 4 * S + 8 * 6.8) * U
        assert (got_x[i] - x_tau).abs().max() < tolerance
        assert (got_target[i] - target).abs().max() < tolerance


def test_compiled_code_draws_the_same_noise() -> None:
    """Also for one image and for packs of other sizes, which share one graph."""
    config = tiny_config(num_stages=3, resolution=32)
    philox.compiled_normals_at.cache_clear()
    torch._dynamo.reset()
    graphs = []
    for count in (7, 1, 24):
        plan = make_plan(config, count, 60 + count)
        images = torch.randint(0, 256, (count, 3, 32, 32), generator=seeded(count), dtype=torch.uint8)
        before = graphs_compiled()
        plain = make_batch(images, torch.arange(count), plan, config)
        assert graphs_compiled() == before, "only compiled batches compile"
        fast = make_batch(images, torch.arange(count), plan, config, compiled=True)
        graphs.append(graphs_compiled() - before)
        assert torch.equal(fast.tokens, plain.tokens)
        assert torch.equal(fast.targets, plain.targets)
    assert graphs == [1, 0, 0]


def graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_wrong_time_image_noise_or_side_would_show() -> None:
    """The comparison above is not blind: whatever a plan says of an image changes its pair, and no other's."""
    config, count = tiny_config(), 6
    plan = make_plan(config, count, 60)
    images = dyadic(count, config, 61, 16, 16)

    def made(plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        batch = make_batch(images, torch.arange(count), plan, config)
        return pictures(batch, batch.tokens, 2), pictures(batch, batch.targets, 2)

    assert config.model.patch_size == 2
    before = made(plan)
    for name, change in (
        ("time", lambda x: (x + 10) % 1000),
        ("noise_seed", lambda x: x + 1),
        ("flip", lambda x: ~x),
    ):
        for i in range(count):
            values = getattr(plan, name).clone()
            values[i] = change(values[i])
            after = made(replace(plan, **{name: values}))
            for j in range(count):
                assert torch.equal(before[0][j], after[0][j]) == (i != j), (name, i, j)
                # Times move the input alone.
                assert torch.equal(before[1][j], after[1][j]) == (i != j or name == "time"), (name, i, j)


def test_an_image_does_not_depend_on_its_mates() -> None:
    config, count = tiny_config(num_classes=9), 9
    plan = make_plan(config, count, 70, drop=torch.arange(count) % 4 == 0, flip=torch.arange(count) % 2 == 0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=seeded(71), dtype=torch.uint8)
    labels = torch.arange(count)
    whole = make_batch(images, labels, plan, config)
    assert whole.labels is not None
    whole_x, whole_target = pictures(whole, whole.tokens, 2), pictures(whole, whole.targets, 2)
    for chosen in ([0, 2, 5], [8], [7, 1, 4, 3]):
        at = torch.tensor(chosen)
        part = make_batch(images[at], labels[at], subset(plan, at), config)
        assert part.labels is not None
        assert torch.equal(part.t_model, whole.t_model[at])
        assert torch.equal(part.labels, whole.labels[at])
        for i, x, target in zip(chosen, pictures(part, part.tokens, 2), pictures(part, part.targets, 2), strict=True):
            assert torch.equal(x, whole_x[i])
            assert torch.equal(target, whole_target[i])


@pytest.mark.parametrize(("count", "num_stages", "resolution"), [(10, 3, 16), (3, 3, 16), (9, 1, 4), (8, 4, 32)])
def test_the_pack_lies_as_its_layout_says(count: int, num_stages: int, resolution: int) -> None:
    config = tiny_config(num_stages, resolution)
    plan = make_plan(config, count, 80)
    batch = make_batch(
        torch.zeros(count, 3, resolution, resolution), torch.zeros(count, dtype=torch.int64), plan, config
    )
    p, c = config.model.patch_size, config.model.in_channels
    assert batch.stage.tolist() == plan.stage.tolist()
    sides = [resolution // 2 ** (num_stages - 1 - s) // p for s in batch.stage.tolist()]
    assert batch.layout.grids == tuple((side, side) for side in sides)
    assert batch.latent_size.tolist() == sides
    total = sum(side * side for side in sides)
    assert batch.layout.num_tokens == total
    assert batch.tokens.shape == batch.targets.shape == (total, c * p * p)
    assert batch.tokens.dtype == batch.targets.dtype == batch.t_model.dtype == torch.float32
    assert batch.t_model.shape == batch.stage.shape == (count,)
    owners = [i for i, side in enumerate(sides) for _ in range(side * side)]
    assert batch.layout.image_index.tolist() == owners


def test_images_labels_and_plan_are_left_as_they_were() -> None:
    config = tiny_config(num_classes=6)
    images, labels = torch.rand(6, 3, 16, 16, generator=seeded(92)), torch.arange(6)
    plan = make_plan(config, 6, 93, drop=torch.ones(6, dtype=torch.bool))
    before, stream = (images.clone(), subset(plan, torch.arange(6))), torch.get_rng_state()
    make_batch(images, labels, plan, config)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, torch.arange(6))
    for field in fields(plan):
        assert torch.equal(getattr(plan, field.name), getattr(before[1], field.name)), field.name
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"


def test_dropped_labels_are_the_null_class() -> None:
    config = tiny_config(num_classes=7)
    drop = torch.tensor([True, False, False, True, False, False])
    batch = make_batch(
        torch.zeros(6, 3, 16, 16), torch.tensor([0, 1, 6, 3, 0, 5]), make_plan(config, 6, 94, drop=drop), config
    )
    assert batch.labels is not None
    assert batch.labels.tolist() == [7, 1, 6, 7, 0, 5]


def test_a_model_without_classes_gets_no_labels() -> None:
    config = tiny_config(num_classes=0)
    batch = make_batch(torch.zeros(4, 3, 16, 16), torch.arange(4), make_plan(config, 4, 95), config)
    assert batch.labels is None


@pytest.mark.parametrize(("images", "labels", "name"), [(3, 4, "images"), (4, 5, "labels")])
def test_a_wrong_number_is_named(images: int, labels: int, name: str) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=rf"^{name}: got [35], expected 4: one for each image of the plan"):
        make_batch(torch.zeros(images, 3, 16, 16), torch.zeros(labels), make_plan(config, 4, 96), config)


def test_a_size_that_the_stages_do_not_divide_is_refused() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match=r"^layout: .*18x18"):
        make_batch(torch.zeros(4, 3, 18, 18), torch.zeros(4), make_plan(config, 4, 97), config)


def test_a_batch_moves_whole() -> None:
    config = tiny_config()
    plan = make_plan(config, 4, seed=3)
    batch = make_batch(torch.zeros(4, 3, 16, 16), torch.arange(4), plan, config)
    assert batch.to(torch.device("cpu")) is batch
    there = batch.to(torch.device("meta"))
    for field in fields(Batch):
        moved, stayed = getattr(there, field.name), getattr(batch, field.name)
        if field.name == "stage":
            assert moved is stayed, "it is there for the host"
        elif isinstance(stayed, Tensor):
            assert (moved.device.type, moved.shape, moved.dtype) == ("meta", stayed.shape, stayed.dtype), field.name
    assert there.layout.grids == batch.layout.grids
    assert there.layout.image_index.device.type == "meta"

"""Compiled training, whose graphs know their packs: level D against the reference, a graph for each shape, no break."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelflow_engine import compilation
from pixelflow_engine.backends import choose
from pixelflow_engine.compilation import compile_blocks
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.operations import PlainOperations
from pixelflow_engine.traceable import KnownPackOperations, TraceableOperations
from pixelflow_kernels import PackedLayout
from pixelflow_training.plan import plan_step
from support.recipes import tiny_recipe
from support.reference_models import random_reference
from support.training_packs import (
    TrainingPack,
    assert_step,
    draw_pack,
    losses_of,
    packed_model,
    packed_step,
    reference_step,
)

ONE_SIZE = [(2, 3)] * 3
MIXED = [(4, 4), (4, 4), (2, 2), (2, 2), (1, 1)]
RAGGED = [(3, 5), (4, 4), (2, 2), (2, 2), (1, 1), (5, 1), (1, 1)]
"""Runs of one and of two, images of one token, neighbours of one length, no order."""
SHAPES: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "one size": ({"heads": 2, "head_dim": 24, "depth": 2}, ONE_SIZE),
    "head dim 72": ({"heads": 2, "head_dim": 72, "depth": 1, "num_classes": 0}, MIXED),
    "ragged": ({"heads": 3, "head_dim": 8, "depth": 1}, RAGGED),
    "text": ({"heads": 1, "head_dim": 24, "depth": 1, "num_classes": 0, "cross_attention_dim": 12}, MIXED[::-1]),
    "no biases": ({"heads": 2, "head_dim": 8, "cross_attention_dim": 12, "attention_bias": False}, RAGGED),
}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace whole graphs and run them as they are: a second instead of twenty."""
    monkeypatch.setattr(compilation.torch, "compile", partial(torch.compile, backend="eager"))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def model_and_pack(
    seed: int, grids: list[tuple[int, int]], dtype: torch.dtype = torch.float32, **shape: Any
) -> tuple[PackedTransformer, TrainingPack]:
    reference = random_reference(seed, **shape)
    return packed_model(reference, KnownPackOperations(), dtype), draw_pack(reference, grids, seed + 1)


@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_gradients_are_the_references(name: str) -> None:
    """Before anything is compiled: one product for three, channels in another order."""
    shape, grids = SHAPES[name]
    reference = random_reference(50, **shape)
    pack = draw_pack(reference, grids, 51)
    found = packed_step(packed_model(reference, KnownPackOperations(), torch.float32), pack)
    assert_step(found, reference_step(reference, pack, torch.float32), reference_step(reference, pack, torch.float64))


def test_compiled_they_are_the_references_too() -> None:
    """Through Inductor."""
    reference = random_reference(60, heads=2, head_dim=24, depth=1)
    pack = draw_pack(reference, [(4, 4), (4, 4), (2, 2)], 61)
    model = packed_model(reference, KnownPackOperations(), torch.float32)
    compile_blocks(model)
    found = packed_step(model, pack)
    assert_step(found, reference_step(reference, pack, torch.float32), reference_step(reference, pack, torch.float64))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_in_float64_nothing_differs_but_the_order_of_sums() -> None:
    """A channel in a wrong place would be an error of size one."""
    model, pack = model_and_pack(70, RAGGED, torch.float64, heads=2, head_dim=24, depth=2)
    ours = packed_step(model, pack)
    model.operations = PlainOperations()
    plain = packed_step(model, pack)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m)


def test_attention_in_bfloat16_is_rounded_once_on_a_cpu() -> None:
    """Results and gradients are those of float64 but for one rounding, because float32 lies in between."""
    layout = PackedLayout.from_grids(MIXED)
    generator = torch.Generator().manual_seed(75)
    inputs = torch.randn(4, layout.num_tokens, 2, 24, generator=generator).bfloat16()

    def results(operations: PlainOperations, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, gradient = inputs.to(dtype).unbind()
        leaves = [x.detach().requires_grad_(True) for x in (q, k, v)]
        out = operations.self_attention(*leaves, layout)
        out.backward(gradient)
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    def is_rounded_once(found: torch.Tensor, true: torch.Tensor) -> bool:
        # Sums of less than a hundred products in float32, whose error does not shrink with the sum.
        allowed = 2.0**-8 * true.abs() + 2.0**-16 * true.abs().max()
        return bool(((found.double() - true).abs() <= allowed).all())

    truth = results(PlainOperations(), torch.float64)
    assert all(map(is_rounded_once, results(KnownPackOperations(), torch.bfloat16), truth))
    assert not all(map(is_rounded_once, results(PlainOperations(), torch.bfloat16), truth)), "or this shows nothing"


def test_a_shape_of_packs_has_graphs_of_its_own_and_no_more(traced_only: None) -> None:
    """Two: the last block begins the head's norm, whose rows lie otherwise in memory."""
    model, pack = model_and_pack(80, MIXED, heads=2, head_dim=8, depth=3)
    compile_blocks(model)
    before = graphs()
    for count, grids in enumerate((MIXED, ONE_SIZE, RAGGED), start=1):
        reference = random_reference(80, heads=2, head_dim=8, depth=3)
        for seed in (1, 2):
            pack = draw_pack(reference, grids, seed)
            losses_of(model, pack).sum().backward()
            assert count <= graphs() - before <= 2 * count, f"{graphs() - before} graphs of {count} shapes"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(("batch_size", "num_stages"), [(6, 3), (4, 3), (6, 4), (7, 4)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_packs_of_training_have_few_shapes(batch_size: int, num_stages: int, world_size: int, tmp_path: Path) -> None:
    """So many graphs there may be: a stage has one of two numbers of images, whatever the step and the rank."""
    side = f"resolution={8 << num_stages}"
    config = tiny_recipe(tmp_path, f"batch_size={batch_size}", f"scheduler.num_stages={num_stages}", side)
    shapes = {
        tuple(plan_step(config, step, 50, rank, world_size).stage.tolist())
        for step in range(200)
        for rank in range(world_size)
    }
    assert 1 <= len(shapes) <= 2**num_stages
    assert 2 * len(shapes) <= compilation.MOST_GRAPHS


def test_who_knows_packs() -> None:
    backend = choose("torch", torch.device("cpu"), torch.float32)
    assert type(backend.operations(True, known_packs=True)) is KnownPackOperations
    assert type(backend.operations(True)) is TraceableOperations, "sampling has a few graphs for any images"
    assert type(backend.operations(False, known_packs=True)) is PlainOperations, (
        "plain training has the reference's bits"
    )


def test_queries_keys_and_values_are_one_product() -> None:
    model, pack = model_and_pack(90, MIXED, heads=2, head_dim=8, depth=1)
    calls = []
    for operations in (PlainOperations(), KnownPackOperations()):
        model.operations = operations
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            losses_of(model, pack)
        calls.append([event.name for event in profiler.events()].count("aten::linear"))
    assert calls[0] - calls[1] == 2, "six products of a block become four"

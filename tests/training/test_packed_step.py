"""A packed training step is that of the reference, image by image: on the plain operations and on the kernels.

What is claimed, and held here:

- Losses, the input's gradient and every parameter's are level D: at most twice as far from the reference in float64 as
  the reference in float32 is, and two roundings.
- An image's velocity, loss and input gradient have the same bits in any pack and at any place, where products do
  (level C): with products whose rows round by themselves, or where the pack has as many tokens as before. So do, on the
  kernels, the gradients of its modulations. A parameter's gradient is a sum over images: level D.
- No image reaches another one: gradients across are zero, what is not a number stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine.fused import FusedOperations
from pixelflow_engine.operations import Operations
from pixelflow_engine.reference import PixelFlowTransformer
from support.kernels import assert_same_bits
from support.reference_models import random_reference
from support.training_packs import (
    RowByRow,
    Step,
    TrainingPack,
    assert_step,
    by_operations,
    draw_pack,
    losses_of,
    packed_model,
    packed_step,
    reference_step,
)

SIZES = [(3, 5), (4, 4), (2, 2), (1, 1), (1, 1)]
FEW = [(1, 2), (2, 2), (1, 1)]
"""The interpreter takes a tenth of a second for a token and block, forward and backward."""
MANY = [(3, 5), (4, 4), (2, 2), (2, 2), (1, 1), (5, 1), (1, 1)]
"""Runs of one and of two, images of one token, neighbours of one length, no order."""
ORDERS = {len(FEW): [2, 0, 1], len(MANY): [4, 0, 6, 2, 5, 1, 3]}
SHAPES: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "head dim 24": ({"heads": 3, "head_dim": 24, "depth": 1}, SIZES),
    "head dim 72": ({"heads": 2, "head_dim": 72, "depth": 1, "num_classes": 0}, [(1, 1), (2, 3)]),
    "text": ({"heads": 1, "head_dim": 24, "depth": 1, "num_classes": 0, "cross_attention_dim": 12}, FEW[::-1]),
    "text and classes": (
        {"heads": 2, "head_dim": 8, "cross_attention_dim": 12, "attention_bias": False, "patch_size": 1},
        [(1, 1), (2, 2)],
    ),
}
WHOLE = {"heads": 4, "head_dim": 24, "depth": 1}
"""Of a width that vectors of 32 floats divide: torch's SiLU and GELU take the rest of a tensor another way."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Between two, a library would divide rows by their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grids_for(operations: Operations) -> list[tuple[int, int]]:
    return FEW if isinstance(operations, FusedOperations) else MANY


def drawn(seed: int, grids: list[tuple[int, int]], **shape: Any) -> tuple[PixelFlowTransformer, TrainingPack]:
    model = random_reference(seed, **shape)
    return model, draw_pack(model, grids, seed + 1)


def assert_reference(found: Step, model: PixelFlowTransformer, pack: TrainingPack) -> None:
    assert_step(found, reference_step(model, pack, torch.float32), reference_step(model, pack, torch.float64))


@by_operations
@pytest.mark.parametrize("name", SHAPES)
def test_losses_and_gradients_are_the_references(operations: Operations, name: str) -> None:
    shape, grids = SHAPES[name]
    model, pack = drawn(10, grids, **shape)
    assert_reference(packed_step(packed_model(model, operations, torch.float32), pack), model, pack)


@by_operations
def test_an_image_is_what_it_is_alone_to_the_last_bit(operations: Operations) -> None:
    """Without the library's products nothing is left that knows of the pack, or of an image's place in it."""
    reference, pack = drawn(20, grids_for(operations), **WHOLE)
    model = packed_model(reference, operations, torch.float32)
    count = len(pack.grids)
    with RowByRow():
        whole = packed_step(model, pack)
        alone = [packed_step(model, pack.pick([i]), count) for i in range(count)]
    assert_reference(whole, reference, pack)
    for i, (single, gradient) in enumerate(zip(alone, pack.parts(whole.tokens), strict=True)):
        assert_same_bits(single.losses[0], whole.losses[i], f"loss of image {i}")
        assert_same_bits(single.tokens, gradient, f"gradient of image {i}")
        if isinstance(operations, FusedOperations):  # plain ones sum a row's gradient by the shape of the pack
            for own, all_rows in zip(single.rows, whole.rows, strict=True):
                assert_same_bits(own[0], all_rows[i], f"gradient of the modulations of image {i}")
    summed = {name: sum_of([single.gradients[name] for single in alone]) for name in whole.gradients}
    assert_reference(Step(whole.losses, whole.tokens, summed), reference, pack)


def sum_of(gradients: list[Tensor]) -> Tensor:
    """One after the other, as gradients accumulate."""
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total += gradient
    return total


@by_operations
def test_the_order_of_images_does_not_matter(operations: Operations) -> None:
    """By the library's products: the pack has as many tokens as before, so an image's bits stay."""
    reference, pack = drawn(30, grids_for(operations), **WHOLE)
    model = packed_model(reference, operations, torch.float32)
    order = ORDERS[len(pack.grids)]
    first, moved = packed_step(model, pack), packed_step(model, pack.pick(order))
    assert_same_bits(moved.losses, first.losses[order], "losses")
    parts = pack.parts(first.tokens)
    assert_same_bits(moved.tokens, torch.cat([parts[i] for i in order]), "gradients of tokens")
    assert_reference(first, reference, pack)
    assert_reference(moved, reference, pack.pick(order))


@by_operations
def test_no_image_reaches_another(operations: Operations) -> None:
    """The gradient of an image's loss by another's tokens, modulations and label is zero, without a remainder."""
    reference, pack = drawn(40, FEW, heads=2, head_dim=24, depth=1, num_classes=7)
    assert pack.labels is not None
    pack.labels.copy_(torch.tensor([5, 7, 0]))
    model = packed_model(reference, operations, torch.float32)
    tokens = pack.tokens.clone().requires_grad_()
    losses = losses_of(model, pack.with_tokens(tokens))
    table = model.class_embedder.embedding_table.weight if model.class_embedder is not None else None
    assert table is not None
    for i, loss in enumerate(losses):
        by_tokens, by_label = torch.autograd.grad(loss, (tokens, table), retain_graph=True)
        for j, part in enumerate(pack.parts(by_tokens)):
            assert bool((part != 0).all()) if i == j else not part.any(), (i, j)
        reached = by_label.any(1)
        assert reached.nonzero().flatten().tolist() == [pack.labels[i]]


@by_operations
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
def test_what_is_not_a_number_stays_in_its_image(operations: Operations) -> None:
    """Put in on purpose; numpy, which interprets the kernels, warns of it."""
    reference, pack = drawn(50, FEW, heads=2, head_dim=24, depth=1)
    model = packed_model(reference, operations, torch.float32)
    clean = packed_step(model, pack)
    sick = 1
    broken = pack.tokens.clone()
    broken[sum(rows * columns for rows, columns in pack.grids[:sick]) + 3, 2] = torch.nan
    found = packed_step(model, pack.with_tokens(broken))
    assert found.losses[sick].isnan()
    well = [i for i in range(len(pack.grids)) if i != sick]
    assert_same_bits(found.losses[well], clean.losses[well], "losses")
    for i in well:
        assert_same_bits(pack.parts(found.tokens)[i], pack.parts(clean.tokens)[i], f"gradient of image {i}")

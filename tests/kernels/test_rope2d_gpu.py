"""The compiled rope2d kernels on a device: rotation level A, norms and gradients level D, packs of 16k tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import op, reference, rope2d, rotation_table
from support import packs, rope
from support.kernels import (
    assert_filled,
    assert_level_d,
    assert_same_bits,
    poisoned_like,
    random_bits,
    surrounded,
)
from support.rope import EPS

pytestmark = pytest.mark.gpu

PACKS = {
    "ragged": [(1, 1), (7, 9), (8, 8), (5, 13), (64, 64)],
    "one token": [(1, 1)],
    "empty": [],
}
HEADS_AND_DIMS = [(16, 72), (16, 64), (3, 24), (1, 8), (8, 128), (4, 80), (4, 96)]
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def places(layout: PackedLayout, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The table comes from the CPU: a device's own cosines differ from it, which is no fault of the kernels."""
    on_cpu = PackedLayout.from_grids(layout.grids)
    table = rotation_table(on_cpu, dim, rope.high_type(dtype)).to(layout.row.device)
    return layout.row, layout.column, surrounded(table, dense=True)


# --- rotation ----------------------------------------------------------------------------------------------


def check_rotation(grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, seed: int) -> int:
    """Both ways; returns the number of values compared."""
    from pixelflow_kernels.rope2d.rotation import launch_rotate

    layout = PackedLayout.from_grids(grids, device="cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    x = surrounded(random_bits(layout.num_tokens, heads * dim, dtype=dtype, generator=generator))
    at = places(layout, dim, dtype)
    for conjugate in (False, True):
        expected = reference.rotate(x.unflatten(-1, (heads, dim)), *at, conjugate)
        assert_same_bits(op._rope2d(x.unflatten(-1, (heads, dim)), *at, conjugate), expected)
        buffer, out = poisoned_like(x)
        launch_rotate(x, *at, out, dim, conjugate)
        assert_filled(buffer, out)
        assert_same_bits(out, expected.flatten(1))
    return 2 * x.numel()


@pytest.mark.parametrize("grids", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_has_the_bits_of_eager_pytorch(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype
) -> None:
    check_rotation(grids, heads, dim, dtype, seed=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_ten_million_values_of_any_bits_turn_as_in_pytorch(dtype: torch.dtype) -> None:
    assert check_rotation([(64, 64)] * 4, 16, 72, dtype, seed=1) > 10**7


@pytest.mark.parametrize("dtype", TYPES)
def test_turning_back_in_autograd(dtype: torch.dtype) -> None:
    layout = PackedLayout.from_grids([(5, 7), (1, 1)], device="cuda")
    generator = torch.Generator("cuda").manual_seed(2)
    x, grad = (random_bits(36, 3, 24, dtype=dtype, generator=generator) for _ in range(2))
    at = places(layout, 24, dtype)
    out = rope2d(x.requires_grad_(), layout, table=at[2])
    (got,) = torch.autograd.grad(out, x, grad)
    assert_same_bits(got, reference.rotate(grad, *at, conjugate=True))


# --- norm and rotation -------------------------------------------------------------------------------------


def check_norm(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, text: int | None, std: float, seed: int
) -> None:
    """Forward and backward against the CPU's float64; the same bits twice, and into strided outputs."""
    from pixelflow_kernels.rope2d.forward import launch_forward

    width, rotate_k = heads * dim, text is None
    layout, on_cpu = PackedLayout.from_grids(grids, device="cuda"), PackedLayout.from_grids(grids)
    q, k, _ = rope.fused_qkv(max(layout.num_tokens, text or 0), width, dtype, std, seed)
    q, k = q[: layout.num_tokens], k[: layout.num_tokens if text is None else text]
    tensors = [q, k, *rope.weights(width, rope.high_type(dtype), seed)]
    drawn = rope.fused_qkv(max(len(q), len(k)), width, dtype, 1.0, seed + 1)
    grads = [g[: len(x)].unflatten(-1, (heads, dim)) for g, x in zip(drawn[:2], (q, k), strict=True)]

    def run(grads: list[Tensor], tensors: list[Tensor], at: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        forward = op._norm_rope2d(*tensors, *at, heads, EPS, rotate_k)
        return *forward, *op._norm_rope2d_backward(*grads, *tensors, *at, EPS, rotate_k)

    at = places(layout, dim, dtype)
    there = [surrounded(x.cuda()) for x in tensors]
    grads_there = [surrounded(g.flatten(1).cuda()).unflatten(-1, (heads, dim)) for g in grads]
    got, again = run(grads_there, there, at), run(grads_there, there, at)
    plain = run(grads, tensors, places(on_cpu, dim, dtype))
    truth = [*rope.norm_and_turn(tensors, on_cpu, heads, rotate_k)]
    truth += rope.gradients(grads, tensors, on_cpu, heads, rotate_k)
    names = ("q", "k", "grad q", "grad k", "grad q_weight", "grad k_weight")
    for name, a, b, c, d in zip(names, got, again, plain, truth, strict=True):
        assert_same_bits(a, b, name)
        assert_level_d(a.cpu(), c, d, name)
    outputs = [poisoned_like(x) for x in there[:2]]
    launch_forward(*there, *at, outputs[0].out, outputs[1].out, dim, EPS, rotate_k)
    for (buffer, out), a in zip(outputs, got[:2], strict=True):
        assert_filled(buffer, out)
        assert_same_bits(out, a.flatten(1), "strided output")


@pytest.mark.parametrize("grids", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("text", [None, 77])
def test_norm_and_rotation(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, text: int | None
) -> None:
    check_norm(grids, heads, dim, dtype, text, std=0.02 if text else 1.0, seed=0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("text", [None, 0])
def test_sixteen_thousand_tokens(dtype: torch.dtype, text: int | None) -> None:
    """More tokens than partial sums: a program has several, and the tail of the last one is masked."""
    check_norm([(64, 64)] * 4 + [(1, 1)], 16, 72, dtype, text, std=1.0, seed=3)


@pytest.mark.parametrize("dtype", TYPES)
def test_tokens_at_odd_addresses(dtype: torch.dtype) -> None:
    """Nothing is known to be a multiple of 16 bytes."""
    from pixelflow_kernels.rope2d.forward import launch_forward
    from pixelflow_kernels.rope2d.rotation import launch_rotate

    layout = PackedLayout.from_grids([(7, 9), (1, 1)], device="cuda")
    buffer = rope.fused_qkv(64, 1152 + 1, dtype, 1.0)[0].cuda()
    x, at = buffer[:, 1:], places(layout, 72, dtype)
    out = torch.empty_like(buffer)[:, 1:]
    launch_rotate(x, *at, out, 72, False)
    assert_same_bits(out, reference.rotate(x.unflatten(-1, (16, 72)), *at).flatten(1))
    weights = [w.cuda() for w in rope.weights(1153, rope.high_type(dtype))]
    outputs = torch.empty_like(buffer)[:, 1:], torch.empty_like(buffer)[:, 1:]
    launch_forward(x, x, *(w[1:] for w in weights), *at, *outputs, 72, EPS, True)
    aligned = op._norm_rope2d(x.contiguous(), x.contiguous(), *(w[1:].clone() for w in weights), *at, 16, EPS, True)
    for name, a, b, w in zip(("q", "k"), outputs, aligned, weights, strict=True):
        truth = rope.norm_and_turn(
            [x.cpu(), x.cpu(), w[1:].cpu(), w[1:].cpu()], PackedLayout.from_grids(layout.grids), 16, True
        )[0]
        assert_level_d(a.cpu(), b.flatten(1).cpu(), truth.flatten(1), name)


@packs.draws(200)
@given(
    packs.grids(),
    st.sampled_from([None, 0, 1, 64, 100]),
    packs.heads(),
    packs.head_dims(),
    packs.types(),
    packs.stds(),
    packs.seeds(),
)
def test_ragged_packs(
    grids: list[tuple[int, int]],
    text: int | None,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    std: float,
    seed: int,
) -> None:
    check_rotation(grids, heads, dim, dtype, seed)
    check_norm(grids, heads, dim, dtype, text, std, seed)

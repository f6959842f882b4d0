"""The rope2d kernels under Triton's interpreter: rotation level A, norms and gradients level D, in fp32, fp64 and fp16.

Outputs lie in poison, inputs in NaN or beside each other in a fused product. A program costs milliseconds here, so
packs are small; corner lengths come once, and `make fuzz` draws more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import op
from support import packs, rope
from support.kernels import (
    assert_level_d,
    assert_same_bits,
    plain,
    random_bits,
    same_bits,
    surrounded,
)
from support.reference_models import seeded
from support.rope import EPS
from support.rope_checks import check_backward, check_forward, check_rotation, operands, places

pytestmark = pytest.mark.interpret

# The interpreter rounds to fp16 as a GPU does, to bf16 it does not.
TYPES = st.sampled_from([torch.float32, torch.float64, torch.float16])
HEADS = st.integers(1, 3)


@pytest.fixture(autouse=True)
def _no_warnings_about_special_values() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


# --- rotation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ten_million_values_of_any_bits_turn_as_in_pytorch(dtype: torch.dtype) -> None:
    """Level A. The kernel is the same for any width, and the interpreter is quick where a token is long."""
    width, dim = 14560 * 72, 72  # just below the longest tile that Triton takes
    layout = PackedLayout.from_grids([(1, 3), (2, 1)])
    generator = seeded(11)
    compared = 0
    for conjugate in (False, True):
        x = random_bits(layout.num_tokens, width, dtype=dtype, generator=generator)
        check_rotation(x, layout, dim, conjugate)
        compared += x.numel()
    assert compared > 10**7


@packs.draws(100)
@given(packs.grids(max_tokens=12), HEADS, packs.head_dims(), TYPES, st.booleans(), packs.seeds())
@example([(1, 2)], 3, 72, torch.float32, False, 1)  # 216 channels: the tile of the last of them is wider than they are
def test_rotation_bits_on_ragged_packs(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, conjugate: bool, seed: int
) -> None:
    layout = PackedLayout.from_grids(grids)
    x = random_bits(layout.num_tokens, heads * dim, dtype=dtype, generator=seeded(seed))
    check_rotation(surrounded(x), layout, dim, conjugate)


# --- norm and rotation -------------------------------------------------------------------------------------


PACKS = packs.grids(max_tokens=8, max_members=4)
TEXT = st.one_of(st.none(), st.integers(0, 6))  # tokens of k, where it has its own


@packs.draws(120)
@given(PACKS, TEXT, HEADS, packs.head_dims(), TYPES, packs.stds(), packs.seeds())
def test_forward_on_ragged_packs(
    grids: list[tuple[int, int]],
    text: int | None,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    std: float,
    seed: int,
) -> None:
    layout = PackedLayout.from_grids(grids)
    tensors, _ = operands(layout, text, heads * dim, dtype, std, seed)
    check_forward(tensors, layout, heads, rotate_k=text is None)


@packs.draws(80)
@given(PACKS, TEXT, HEADS, packs.head_dims(), TYPES, packs.stds(), packs.seeds(), st.sampled_from([1, 3, 5, 1024]))
def test_backward_on_ragged_packs(
    grids: list[tuple[int, int]],
    text: int | None,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    std: float,
    seed: int,
    partials: int,
) -> None:
    """Few partial sums make programs with several tokens, and a last program with fewer."""
    from pixelflow_kernels.rope2d import backward

    layout = PackedLayout.from_grids(grids)
    tensors, grads = operands(layout, text, heads * dim, dtype, std, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "MAX_PARTIALS", partials)
        check_backward(tensors, grads, layout, heads, rotate_k=text is None)


def test_corner_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelflow_kernels.rope2d import backward

    monkeypatch.setattr(backward, "MAX_PARTIALS", 50)
    layout = PackedLayout.from_grids([(1, 1), (7, 9), (8, 8), (5, 13)])
    tensors, grads = operands(layout, 0, 24, torch.float32, 1.0, 3)
    check_forward(tensors, layout, 3, rotate_k=False)
    check_backward(tensors, grads, layout, 3, rotate_k=False)
    check_rotation(tensors[0], layout, 8, conjugate=False)


def test_the_longest_member() -> None:
    layout = PackedLayout.from_grids([(24, 25)])
    tensors, _ = operands(layout, 0, 24, torch.float32, 1.0, 3)
    check_forward(tensors, layout, 3, rotate_k=False)


def test_one_pass_rounds_where_two_would() -> None:
    """Norm, then rotation of the rounded norm: bits of the separate passes (no multiply-adds fuse here)."""
    layout = PackedLayout.from_grids([(2, 3), (1, 1)])
    tensors, _ = operands(layout, None, 144, torch.float16, 1.0, 6)
    at = places(layout, 72, torch.float16)
    q, turned = op._launch_norm_rope2d(*tensors, *at, 2, EPS, True)
    same_q, normed = op._launch_norm_rope2d(*tensors, *at, 2, EPS, False)
    assert_same_bits(same_q, q)
    assert_same_bits(turned, op._launch_rope2d(normed, *at, False))


def test_weight_gradients_have_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelflow_kernels.rope2d import backward

    monkeypatch.setattr(backward, "MAX_PARTIALS", 16)
    layout = PackedLayout.from_grids([(5, 7)])
    tensors, (grad, _) = operands(layout, None, 24, torch.float32, 1.0, 4)
    grad = grad.unflatten(-1, (3, 8))
    arguments = (grad, grad, *tensors, *places(layout, 8, torch.float32), EPS, True)
    first, second = (op._launch_norm_rope2d_backward(*arguments) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_what_a_cuda_call_runs() -> None:
    """The CUDA implementations end to end: a published width, an expanded gradient, an empty pack."""
    layout = PackedLayout.from_grids([(1, 2), (1, 1)])
    q, k, _ = rope.fused_qkv(3, 1152, torch.float32, 1.0)
    tensors = (q, k, *rope.weights(1152, torch.float32))
    at = places(layout, 72, torch.float32)
    for rotate_k in (True, False):
        got = op._launch_norm_rope2d(*tensors, *at, 16, EPS, rotate_k)
        truth = rope.norm_and_turn(tensors, layout, 16, rotate_k)
        for a, b, c in zip(got, plain(op._norm_rope2d)(*tensors, *at, 16, EPS, rotate_k), truth, strict=True):
            assert a.is_contiguous()
            assert_level_d(a, b, c)
        grads = (torch.ones(1, 1, 1).expand(3, 16, 72), torch.ones(16, 72, 3).permute(2, 0, 1))
        got = op._launch_norm_rope2d_backward(*grads, *tensors, *at, EPS, rotate_k)
        in_torch = plain(op._norm_rope2d_backward)(*grads, *tensors, *at, EPS, rotate_k)
        for a, b, c in zip(got, in_torch, rope.gradients(grads, tensors, layout, 16, rotate_k), strict=True):
            assert_level_d(a, b, c)
        assert_same_bits(op._launch_rope2d(grads[1], *at, rotate_k), plain(op._rope2d)(grads[1], *at, rotate_k))
    nothing = q[:0].unflatten(-1, (16, 72))
    empty = (*[x[:0] for x in at[:2]], at[2])
    assert op._launch_rope2d(nothing, *empty, False).shape == (0, 16, 72)
    got = op._launch_norm_rope2d_backward(nothing, nothing, q[:0], k[:0], *tensors[2:], *empty, EPS, True)
    assert [x.shape[0] for x in got] == [0, 0, 1152, 1152]
    assert not got[2].any()
    assert not got[3].any()

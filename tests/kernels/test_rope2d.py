"""rope2d on a CPU: the meaning against float64 and the engine's layers, the registration, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_engine import layers
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import norm_rope2d_q_norm_k, op, qk_norm_rope2d, rope2d, rotation_table
from support import packs, rope
from support.kernels import assert_level_d, assert_same_bits, random_bits, surrounded
from support.reference_models import seeded

RAGGED = [(1, 1), (3, 2), (1, 5), (6, 4), (2, 4)]


# --- meaning -----------------------------------------------------------------------------------------------


@packs.draws(150)
@example([(1, 1), (7, 9), (8, 8), (5, 13), (20, 20)], 16, 72, torch.bfloat16, 0.02, 1)
@given(packs.grids(), packs.heads(8), packs.head_dims(), packs.types(), packs.stds(), packs.seeds())
def test_ragged_packs_against_a_second_derivation(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, std: float, seed: int
) -> None:
    """Level D; the plain computation is the engine's."""
    layout = PackedLayout.from_grids(grids)
    q, k, _ = rope.fused_qkv(layout.num_tokens, heads * dim, dtype, std, seed)
    leaves = [q, k, *rope.weights(heads * dim, dtype, seed)]
    rotary = layers.rotary_tables(layout, dim, rope.high_type(dtype))
    plain = [layers.rms_norm(x, w).unflatten(-1, (heads, dim)) for x, w in zip(leaves[:2], leaves[2:], strict=True)]
    for rotate_k, function in ((True, qk_norm_rope2d), (False, norm_rope2d_q_norm_k)):
        outputs = function(*leaves, layout, num_heads=heads)
        truth = rope.norm_and_turn(leaves, layout, heads, rotate_k)
        plains = (layers.rotate(plain[0], rotary), layers.rotate(plain[1], rotary) if rotate_k else plain[1])
        for name, a, b, c in zip(("q", "k"), outputs, plains, truth, strict=True):
            assert a.is_contiguous()
            assert_level_d(a, b, c, name)


@packs.draws(50)
@given(packs.grids(max_tokens=80), packs.heads(4), packs.head_dims(), st.booleans(), packs.stds(), packs.seeds())
def test_float64_agrees_to_the_last_digits(
    grids: list[tuple[int, int]], heads: int, dim: int, rotate_k: bool, std: float, seed: int
) -> None:
    """Values and gradients; nothing but float64's own roundings lies between the two derivations."""
    layout = PackedLayout.from_grids(grids)
    q, k, _ = rope.fused_qkv(layout.num_tokens, heads * dim, torch.float64, std, seed)
    k = k if rotate_k else k[: layout.num_tokens // 2]
    leaves = [x.requires_grad_() for x in (q.detach(), k.detach(), *rope.weights(heads * dim, torch.float64, seed))]
    function = qk_norm_rope2d if rotate_k else norm_rope2d_q_norm_k
    outputs = function(*leaves, layout, num_heads=heads)
    for a, b in zip(outputs, rope.norm_and_turn(leaves, layout, heads, rotate_k), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    grads = [torch.randn(x.shape, generator=seeded(seed), dtype=torch.float64) for x in outputs]
    got = torch.autograd.grad(outputs, leaves, grads)
    for a, b in zip(got, rope.gradients(grads, leaves, layout, heads, rotate_k), strict=True):
        # One rounding is 1e-16; gradients grow as 1 / std, and sums run over up to 80 tokens of 512 channels.
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_are_those_of_the_engines_layers(dtype: torch.dtype) -> None:
    layout = PackedLayout.from_grids(RAGGED)
    q, k, _ = rope.fused_qkv(layout.num_tokens, 144, dtype, 1.0)
    q_weight, k_weight = rope.weights(144, torch.promote_types(dtype, torch.float32))
    rotary = layers.rotary_tables(layout, 72, layers.at_least_fp32(dtype))
    table = rotation_table(layout, 72, layers.at_least_fp32(dtype))
    q_out, k_out = qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=2, table=table)
    for out, x, weight in ((q_out, q, q_weight), (k_out, k, k_weight)):
        normed = layers.rms_norm(x, weight).unflatten(-1, (2, -1))
        assert_same_bits(out, layers.rotate(normed, rotary))
        assert_same_bits(rope2d(normed, layout), layers.rotate(normed, rotary))
    _, plain_k = norm_rope2d_q_norm_k(q, k[:5], q_weight, k_weight, layout, num_heads=2)
    assert_same_bits(plain_k, layers.rms_norm(k[:5], k_weight).unflatten(-1, (2, -1)))


@packs.draws(40)
@given(packs.grids(max_tokens=100), packs.heads(3), packs.head_dims(), packs.types(), packs.seeds())
def test_rotation_of_any_bits_is_that_of_the_engines_layers(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    """Level A, and turning back by the transpose."""
    layout = PackedLayout.from_grids(grids)
    x = random_bits(layout.num_tokens, heads * dim, dtype=dtype, generator=seeded(seed)).unflatten(-1, (heads, dim))
    high = rope.high_type(dtype)
    cos, sin = layers.rotary_tables(layout, dim, high)
    x = surrounded(x.flatten(1)).unflatten(-1, (heads, dim)).requires_grad_()
    out = rope2d(x, layout)
    assert_same_bits(out, layers.rotate(x, (cos, sin)))
    (grad,) = torch.autograd.grad(out, x, x.detach())
    assert_same_bits(grad, layers.rotate(x.detach(), (cos, -sin)))


@pytest.mark.parametrize("function", [qk_norm_rope2d, norm_rope2d_q_norm_k])
def test_gradients_are_those_of_autograd_through_the_layers(function: Any) -> None:
    layout = PackedLayout.from_grids([(2, 3), (1, 1)])
    rotary = layers.rotary_tables(layout, 8, torch.float64)
    leaves = [x.clone().requires_grad_() for x in rope.fused_qkv(7, 16, torch.float64, 1.0)[:2]]
    leaves += [x.requires_grad_() for x in rope.weights(16, torch.float64)]

    def plain(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (layers.rms_norm(x, w).unflatten(-1, (2, -1)) for x, w in ((q, q_weight), (k, k_weight)))
        return layers.rotate(q, rotary), layers.rotate(k, rotary) if function is qk_norm_rope2d else k

    generator = torch.Generator().manual_seed(3)
    grads = torch.randn(2, 7, 2, 8, generator=generator, dtype=torch.float64).unbind()
    expected = torch.autograd.grad(plain(*leaves), leaves, grads)
    got = torch.autograd.grad(function(*leaves, layout, num_heads=2), leaves, grads)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.autograd.gradcheck(lambda *x: function(*x, layout, num_heads=2), leaves)
    x = leaves[0].detach().unflatten(-1, (2, 8)).requires_grad_()
    torch.autograd.gradcheck(lambda x: rope2d(x, layout), [x])
    torch.autograd.gradgradcheck(lambda x: rope2d(x, layout), [x])


# --- registration ------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype = torch.float32) -> tuple[PackedLayout, Tensor, Tensor, Tensor, Tensor]:
    layout = PackedLayout.from_grids([(2, 3), (1, 1)])
    q, k, _ = (x.requires_grad_() for x in rope.fused_qkv(7, 24, dtype, 1.0))
    q_weight, k_weight = (w.requires_grad_() for w in rope.weights(24, torch.float32))
    return layout, q, k, q_weight, k_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype: torch.dtype) -> None:
    layout, q, k, q_weight, k_weight = operands(dtype)
    places = (layout.row, layout.column, rotation_table(layout, 8))
    for conjugate in (False, True):
        x = q.detach().unflatten(-1, (3, 8)).requires_grad_()
        torch.library.opcheck(op._rope2d, (x, *places, conjugate))
    for rotate_k in (False, True):
        torch.library.opcheck(op._norm_rope2d, (q, k, q_weight, k_weight, *places, 3, 1e-6, rotate_k))
        grad = torch.randn(7, 3, 8).to(dtype)
        tensors = [x.detach() for x in (grad, grad, q, k, q_weight, k_weight)]
        torch.library.opcheck(op._norm_rope2d_backward, (*tensors, *places, 1e-6, rotate_k))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_under_compile(backend: str) -> None:
    layout, *leaves = operands()
    table = rotation_table(layout, 8)

    def block(*leaves: Tensor) -> tuple[Tensor, ...]:
        q, k = qk_norm_rope2d(*leaves, layout, num_heads=3, table=table)
        q, _ = norm_rope2d_q_norm_k(q.flatten(1), k.flatten(1), *leaves[2:], layout, num_heads=3, table=table)
        return rope2d(q, layout, table=table), k

    expected = block(*leaves)
    torch._dynamo.reset()
    got = torch.compile(block, fullgraph=True, backend=backend)(*leaves)
    grads = [torch.randn(x.shape, generator=seeded(2)) for x in expected]
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    for a, b in zip(torch.autograd.grad(got, leaves, grads), torch.autograd.grad(expected, leaves, grads), strict=True):
        torch.testing.assert_close(a, b)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(7, 3, 8)}, "q: got shape"),
        ({"q": torch.zeros(6, 24), "k": torch.zeros(6, 24)}, "q: got 6 tokens, expected the layout's 7"),
        ({"q": torch.zeros(7, 24, dtype=torch.int32)}, "q: got torch.int32"),
        ({"q": torch.zeros(24, 7).T}, "q: got channel stride 7"),
        ({"k": torch.zeros(24)}, r"k: got shape \(24,\), expected two dimensions"),
        ({"k": torch.zeros(24, 7).T}, "k: got channel stride 7"),
        ({"q_weight": torch.zeros(24, dtype=torch.int64)}, "q_weight: got torch.int64"),
        ({"q_weight": torch.zeros(24, device="meta")}, "q_weight: got device meta"),
        ({"k_weight": torch.zeros(24, device="meta")}, "k_weight: got device meta"),
        ({"num_heads": -3}, "num_heads: got -3"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"table": torch.zeros(3, 4, device="meta")}, "table: got torch.float32 on meta"),
        ({"k": torch.zeros(7, 16)}, "k: got width 16"),
        ({"k": torch.zeros(6, 24)}, "k: got 6 tokens"),
        ({"k": torch.zeros(7, 24, dtype=torch.float64)}, "k: got torch.float64"),
        ({"k": torch.zeros(7, 24, device="meta")}, "k: got device meta"),
        ({"q_weight": torch.zeros(23)}, "q_weight: got shape"),
        ({"k_weight": torch.zeros(48)[::2]}, "k_weight: got channel stride 2"),
        ({"num_heads": 5}, "num_heads: got 5"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"num_heads": 2}, "head dim: got 12"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"layout": PackedLayout.from_grids([(7, 1)], "meta")}, "layout: got device meta"),
        ({"table": torch.zeros(2, 4)}, "table: got shape"),
        ({"table": torch.zeros(3, 5)}, "table: got shape"),
        ({"table": torch.zeros(3, 4, dtype=torch.float64)}, "table: got torch.float64"),
        ({"table": torch.zeros(4, 3).T}, "not contiguous"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    layout, q, k, q_weight, k_weight = operands()
    arguments = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "layout": layout, "num_heads": 3}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope2d(**(arguments | change))


def test_cross_attention_refuses_by_name() -> None:
    layout, q, k, q_weight, k_weight = operands()
    for change, message in (({"k": k[:, :16]}, "k: got width 16"), ({"q": q[:5]}, "q: got 5 tokens")):
        arguments = {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "layout": layout, "num_heads": 3}
        with pytest.raises(ValueError, match=message):
            norm_rope2d_q_norm_k(**(arguments | change))


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        (torch.zeros(6, 16), None, r"x: got shape \(6, 16\), expected three dimensions"),
        (torch.zeros(6, 0, 8), None, r"x: got shape \(6, 0, 8\), expected at least one head"),
        (torch.zeros(5, 2, 8), None, "x: got 5 tokens, expected the layout's 6"),
        (torch.zeros(6, 2, 12), None, "head dim: got 12, expected a positive multiple of 8"),
        (torch.zeros(6, 2, 0), None, "head dim: got 0"),
        (torch.zeros(6, 2, 12)[..., :8], None, "x: got head stride 12, expected heads side by side"),
        (torch.zeros(6, 8, 2).mT, None, "x: got channel stride 2"),
        (torch.zeros(6, 2, 8, dtype=torch.int32), None, "x: got torch.int32, expected one of torch.bfloat16"),
        (torch.zeros(6, 2, 8, device="meta"), None, "layout: got device cpu, expected that of x"),
        (torch.zeros(6, 2, 8), torch.zeros(2, 4), r"table: got shape \(2, 4\), expected \[at least 3, 4\]"),
        (torch.zeros(6, 2, 8, dtype=torch.float64), torch.zeros(3, 4), "table: got torch.float32 on cpu, expected"),
    ],
)
def test_rotation_refuses_by_name(x: Tensor, table: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope2d(x, PackedLayout.from_grids([(2, 3)]), table=table)


def test_a_table_of_an_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head dim: got 4"):
        rotation_table(PackedLayout.from_grids([(2, 3)]), 4)


def test_one_head_and_one_token_may_have_any_stride() -> None:
    """A stride that is never used is not refused."""
    layout = PackedLayout.from_grids([(1, 1)])
    x = torch.ones(1, 1, 8).as_strided((1, 1, 8), (3, 5, 1))
    assert_same_bits(rope2d(x, layout), x.contiguous())
    assert rope2d(torch.zeros(0, 2, 8), PackedLayout.from_grids([])).shape == (0, 2, 8)

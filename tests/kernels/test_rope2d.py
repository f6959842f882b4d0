"""rope2d on a CPU: the meaning against float64 and the engine's layers, the registration, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import layers
from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import norm_rope2d_q_norm_k, op, qk_norm_rope2d, rope2d, rotation_table
from support import rope

HEADS_AND_DIMS = [(1, 8), (3, 24), (2, 64), (2, 72), (2, 128)]


# --- meaning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grids", rope.GRIDS.values(), ids=rope.GRIDS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_float64_agrees_with_a_second_derivation(
    grids: list[tuple[int, int]], heads: int, dim: int, std: float
) -> None:
    layout = rope.layout_of(grids)
    q, k, _ = rope.fused_qkv(layout.num_tokens, heads * dim, torch.float64, std)
    q_weight, k_weight = rope.weights(heads * dim, torch.float64)
    q_out, k_out = qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=heads)
    q_normed, k_normed = rope.norm(q, q_weight, heads), rope.norm(k, k_weight, heads)
    torch.testing.assert_close(q_out, rope.turn(q_normed, layout), rtol=0, atol=1e-12)
    torch.testing.assert_close(k_out, rope.turn(k_normed, layout), rtol=0, atol=1e-12)
    text = k[: layout.num_tokens // 2]
    q_out, k_out = norm_rope2d_q_norm_k(q, text, q_weight, k_weight, layout, num_heads=heads)
    torch.testing.assert_close(q_out, rope.turn(q_normed, layout), rtol=0, atol=1e-12)
    torch.testing.assert_close(k_out, k_normed[: layout.num_tokens // 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_those_of_the_engines_layers(dtype: torch.dtype) -> None:
    layout = rope.layout_of(rope.GRIDS["ragged"])
    q, k, _ = rope.fused_qkv(layout.num_tokens, 144, dtype, 1.0)
    q_weight, k_weight = rope.weights(144, torch.promote_types(dtype, torch.float32))
    rotary = layers.rotary_tables(layout, 72, layers.at_least_fp32(dtype))
    table = rotation_table(layout, 72, layers.at_least_fp32(dtype))
    q_out, k_out = qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=2, table=table)
    for out, x, weight in ((q_out, q, q_weight), (k_out, k, k_weight)):
        normed = layers.rms_norm(x, weight).unflatten(-1, (2, -1))
        assert rope.same_bits(out, layers.rotate(normed, rotary))
        assert rope.same_bits(rope2d(normed, layout), layers.rotate(normed, rotary))
    _, plain_k = norm_rope2d_q_norm_k(q, k[:5], q_weight, k_weight, layout, num_heads=2)
    assert rope.same_bits(plain_k, layers.rms_norm(k[:5], k_weight).unflatten(-1, (2, -1)))


@pytest.mark.parametrize("function", [qk_norm_rope2d, norm_rope2d_q_norm_k])
def test_gradients_are_those_of_autograd_through_the_layers(function: Any) -> None:
    layout = rope.layout_of([(2, 3), (1, 1)])
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
    layout = rope.layout_of([(2, 3), (1, 1)])
    q, k, _ = (x.requires_grad_() for x in rope.fused_qkv(7, 24, dtype, 1.0))
    q_weight, k_weight = (w.requires_grad_() for w in rope.weights(24, torch.float32))
    return layout, q, k, q_weight, k_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own, inside inductor
def test_one_graph_under_compile(backend: str) -> None:
    layout, q, k, q_weight, k_weight = operands()

    def loss(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        q1, k1 = qk_norm_rope2d(q, k, q_weight, k_weight, layout, num_heads=3)
        q2, k2 = norm_rope2d_q_norm_k(q, k, q_weight, k_weight, layout, num_heads=3)
        return (rope2d(q1 + q2, layout) * (k1 - k2)).square().sum()

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, q_weight, k_weight)]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(7, 3, 8)}, "q: got shape"),
        ({"q": torch.zeros(6, 24), "k": torch.zeros(6, 24)}, "q: got 6 tokens, expected the layout's 7"),
        ({"q": torch.zeros(7, 24, dtype=torch.int32)}, "q: got torch.int32"),
        ({"q": torch.zeros(24, 7).T}, "q: got channel stride 7"),
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
        ({"layout": rope.layout_of([(7, 1)], "meta")}, "layout: got device meta"),
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


def test_rotation_refuses_by_name() -> None:
    layout = rope.layout_of([(2, 3)])
    with pytest.raises(ValueError, match="x: got shape"):
        rope2d(torch.zeros(6, 16), layout)
    with pytest.raises(ValueError, match="x: got head stride 12"):
        rope2d(torch.zeros(6, 2, 12)[..., :8], layout)
    with pytest.raises(ValueError, match="head dim: got 4"):
        rotation_table(layout, 4)

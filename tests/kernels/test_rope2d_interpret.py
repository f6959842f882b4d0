"""The rope2d kernels under Triton's interpreter: rotation level A, norms and gradients level D, in fp32 and fp64.

Outputs are slices of NaN-filled buffers, so an element left unwritten or written beside the output shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import op, reference, rotation_table
from support import rope

pytestmark = pytest.mark.interpret

HEADS_AND_DIMS = [(1, 8), (3, 24), (2, 64), (3, 72), (1, 128)]
DTYPES = [torch.float32, torch.float64]
EPS = 1e-6


def truth_of(leaves: list[Tensor], layout: PackedLayout, heads: int, rotate_k: bool) -> tuple[Tensor, Tensor]:
    """In float64, differentiable."""
    q, k, q_weight, k_weight = leaves
    k = rope.norm(k, k_weight, heads)
    return rope.turn(rope.norm(q, q_weight, heads), layout), rope.turn(k, layout) if rotate_k else k


@pytest.mark.parametrize("grids", rope.GRIDS.values(), ids=rope.GRIDS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, about infinities put in on purpose
def test_rotation_bits(grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, conjugate: bool) -> None:
    from pixelflow_kernels.rope2d import kernels

    layout = rope.layout_of(grids)
    x = rope.fused_qkv(layout.num_tokens, heads * dim, dtype, 1.0)[1]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-42, -1e-42, torch.finfo(dtype).max], dtype=dtype)
    x[:, : min(heads * dim, 7)] = special[: heads * dim]
    table = rotation_table(layout, dim, dtype)
    expected = reference.rotate(x.unflatten(-1, (heads, dim)), layout.row, layout.column, table, conjugate)
    buffer, out = rope.poisoned(*x.shape, dtype)
    kernels.launch_rotate(x, layout.row, layout.column, table, out, dim, conjugate)
    assert rope.same_bits(out, expected.flatten(1))
    assert int(buffer.isnan().sum()) == buffer.numel() - out.numel() + int(out.isnan().sum()), "written outside"


@pytest.mark.parametrize("grids", rope.GRIDS.values(), ids=rope.GRIDS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate_k", [True, False])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_forward(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, rotate_k: bool, std: float
) -> None:
    from pixelflow_kernels.rope2d import kernels

    layout, width = rope.layout_of(grids), heads * dim
    q, k, _ = rope.fused_qkv(layout.num_tokens, width, dtype, std)
    k = k if rotate_k else k[: layout.num_tokens // 3]
    tensors = [q, k, *rope.weights(width, dtype)]
    places = (layout.row, layout.column, rotation_table(layout, dim, dtype))
    outputs = [rope.poisoned(*x.shape, dtype) for x in (q, k)]
    kernels.launch_forward(*tensors, *places, outputs[0][1], outputs[1][1], dim, EPS, rotate_k)
    plain = op._norm_rope2d(*tensors, *places, heads, EPS, rotate_k)
    truth = truth_of(tensors, layout, heads, rotate_k)
    for name, (buffer, out), a, b in zip(("q", "k"), outputs, plain, truth, strict=True):
        rope.assert_filled(buffer, out)
        rope.assert_level_d(out, a.flatten(1), b.flatten(1), name)


@pytest.mark.parametrize("grids", rope.GRIDS.values(), ids=rope.GRIDS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate_k", [True, False])
def test_backward(
    grids: list[tuple[int, int]],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    rotate_k: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against autograd of the float64 formula; several tokens to a program, and a last program with fewer."""
    from pixelflow_kernels.rope2d import kernels

    monkeypatch.setattr(kernels, "MAX_PARTIALS", 20)
    layout, width = rope.layout_of(grids), heads * dim
    q, k, _ = rope.fused_qkv(layout.num_tokens, width, dtype, 1.0)
    k = k if rotate_k else k[: layout.num_tokens // 3]
    tensors = [q, k, *rope.weights(width, dtype)]
    places = (layout.row, layout.column, rotation_table(layout, dim, dtype))
    # Gradients too come as slices of something wider.
    grads = [
        g[: x.shape[0]] for g, x in zip(rope.fused_qkv(layout.num_tokens, width, dtype, 1.0, 5), (q, k), strict=False)
    ]
    outputs = [rope.poisoned(*x.shape, dtype) for x in (q, k)]
    of_weights = kernels.launch_backward(*grads, *tensors, *places, outputs[0][1], outputs[1][1], dim, EPS, rotate_k)
    by_heads = [g.unflatten(-1, (heads, dim)) for g in grads]
    plain = op._norm_rope2d_backward(*by_heads, *tensors, *places, EPS, rotate_k)
    leaves = [x.double().requires_grad_() for x in tensors]
    truth = torch.autograd.grad(truth_of(leaves, layout, heads, rotate_k), leaves, [g.double() for g in by_heads])
    for buffer, out in outputs:
        rope.assert_filled(buffer, out)
    got = [outputs[0][1], outputs[1][1], *of_weights]
    for name, a, b, c in zip(("q", "k", "q_weight", "k_weight"), got, plain, truth, strict=True):
        rope.assert_level_d(a, b, c, name)
    assert all(w.shape == (width,) for w in of_weights)


def test_weight_gradients_have_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelflow_kernels.rope2d import kernels

    monkeypatch.setattr(kernels, "MAX_PARTIALS", 16)
    layout = rope.layout_of([(9, 11)])
    q, k, grad = rope.fused_qkv(layout.num_tokens, 24, torch.float32, 1.0)
    grad = grad.unflatten(-1, (3, 8))
    arguments = (
        grad,
        grad,
        q,
        k,
        *rope.weights(24, torch.float32),
        layout.row,
        layout.column,
        rotation_table(layout, 8),
    )
    first, second = (op._launch_norm_rope2d_backward(*arguments, EPS, True) for _ in range(2))
    assert all(rope.same_bits(a, b) for a, b in zip(first, second, strict=True))
    plain = op._norm_rope2d_backward(*arguments, EPS, True)
    truth = op._norm_rope2d_backward(
        *(x.double() for x in arguments[:6]),
        layout.row,
        layout.column,
        rotation_table(layout, 8, torch.float64),
        EPS,
        True,
    )
    for a, b, c in zip(first, plain, truth, strict=True):
        rope.assert_level_d(a, b, c)


def test_what_a_cuda_call_runs() -> None:
    """The CUDA implementations end to end: a published width, an expanded gradient, an empty pack."""
    layout = rope.layout_of([(1, 2), (1, 1)])
    q, k, _ = rope.fused_qkv(3, 1152, torch.float32, 1.0)
    tensors = (q, k, *rope.weights(1152, torch.float32))
    places = (layout.row, layout.column, rotation_table(layout, 72))
    for rotate_k in (True, False):
        got = op._launch_norm_rope2d(*tensors, *places, 16, EPS, rotate_k)
        for a, b in zip(got, op._norm_rope2d(*tensors, *places, 16, EPS, rotate_k), strict=True):
            assert a.is_contiguous()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        grads = (torch.ones(1, 1, 1).expand(3, 16, 72), torch.ones(16, 72, 3).permute(2, 0, 1))
        got = op._launch_norm_rope2d_backward(*grads, *tensors, *places, EPS, rotate_k)
        for a, b in zip(got, op._norm_rope2d_backward(*grads, *tensors, *places, EPS, rotate_k), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert rope.same_bits(op._launch_rope2d(grads[1], *places, rotate_k), op._rope2d(grads[1], *places, rotate_k))
    nothing = q[:0].unflatten(-1, (16, 72))
    empty = [x[:0] for x in places[:2]]
    assert op._launch_rope2d(nothing, *empty, places[2], False).shape == (0, 16, 72)
    got = op._launch_norm_rope2d_backward(nothing, nothing, q[:0], k[:0], *tensors[2:], *empty, places[2], EPS, True)
    assert [x.shape[0] for x in got] == [0, 0, 1152, 1152]
    assert not got[2].any()
    assert not got[3].any()

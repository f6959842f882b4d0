"""The compiled rope2d kernels on a device: rotation level A, norms and gradients level D, packs of 16k tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import op, reference, rotation_table
from support import rope

pytestmark = pytest.mark.gpu

PACKS = {
    "ragged": [(1, 1), (7, 9), (8, 8), (5, 13), (64, 64)],
    "16k tokens": [(64, 64)] * 4,
    "one token": [(1, 1)],
    "empty": [],
}
HEADS_AND_DIMS = [(16, 72), (16, 64), (3, 24), (1, 8), (8, 128)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6


def cuda(*tensors: Tensor) -> list[Tensor]:
    return [x.cuda() for x in tensors]


def places(layout: PackedLayout, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return layout.row, layout.column, rotation_table(layout, dim, dtype)


@pytest.mark.parametrize("grids", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conjugate", [False, True])
def test_rotation_has_the_bits_of_eager_pytorch(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, conjugate: bool
) -> None:
    from pixelflow_kernels.rope2d import kernels

    layout = rope.layout_of(grids, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(layout.num_tokens, 3 * heads * dim, generator=generator, device="cuda").to(dtype).chunk(3, -1)[1]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, -1e-42], dtype=dtype, device="cuda")
    x[:, :7] = special
    arguments = (*places(layout, dim), conjugate)
    expected = reference.rotate(x.unflatten(-1, (heads, dim)), *arguments)
    assert rope.same_bits(op._rope2d(x.unflatten(-1, (heads, dim)), *arguments), expected)
    buffer, out = rope.poisoned(*x.shape, dtype, "cuda")
    kernels.launch_rotate(x, *arguments[:3], out, dim, conjugate)
    assert rope.same_bits(out, expected.flatten(1))
    assert int(buffer.isnan().sum()) == buffer.numel() - out.numel() + int(out.isnan().sum()), "written outside"


@pytest.mark.parametrize("grids", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate_k", [True, False])
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_norm_and_rotation(
    grids: list[tuple[int, int]], heads: int, dim: int, dtype: torch.dtype, rotate_k: bool, std: float
) -> None:
    """Forward and backward against the CPU's float64; the same bits twice."""
    from pixelflow_kernels.rope2d import kernels

    width = heads * dim
    layout, on_cpu = rope.layout_of(grids, "cuda"), rope.layout_of(grids)
    q, k, _ = rope.fused_qkv(layout.num_tokens, width, dtype, std)
    k = k if rotate_k else k[: layout.num_tokens // 3]
    tensors = [q, k, *rope.weights(width, torch.float32)]
    grads = rope.fused_qkv(layout.num_tokens, width, dtype, 1.0, 5)[:2]
    grads = tuple(g[: x.shape[0]].unflatten(-1, (heads, dim)) for g, x in zip(grads, (q, k), strict=True))

    def run(grads: list[Tensor], tensors: list[Tensor], at: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        forward = op._norm_rope2d(*tensors, *at, heads, EPS, rotate_k)
        return *forward, *op._norm_rope2d_backward(*grads, *tensors, *at, EPS, rotate_k)

    got = run(cuda(*grads), cuda(*tensors), places(layout, dim))
    again = run(cuda(*grads), cuda(*tensors), places(layout, dim))
    plain = run(list(grads), tensors, places(on_cpu, dim))
    high = places(on_cpu, dim, torch.float64)
    truth = run([g.double() for g in grads], [x.double() for x in tensors], high)
    names = ("q", "k", "grad q", "grad k", "grad q_weight", "grad k_weight")
    for name, a, b, c, d in zip(names, got, again, plain, truth, strict=True):
        assert rope.same_bits(a, b), f"{name}: not reproducible"
        rope.assert_level_d(a.cpu(), c, d, name)
    outputs = [rope.poisoned(*x.shape, dtype, "cuda") for x in (q, k)]
    kernels.launch_forward(
        *cuda(*tensors), *places(layout, dim), outputs[0][1], outputs[1][1], dim, EPS, rotate_k
    )  # fmt: skip
    for (buffer, out), a in zip(outputs, got[:2], strict=True):
        rope.assert_filled(buffer, out)
        assert rope.same_bits(out, a.flatten(1)), "the output's stride changed its bits"

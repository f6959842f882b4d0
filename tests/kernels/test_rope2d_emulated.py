"""The compiled rope2d kernels, emulated: rotation level A, norms and gradients level D, in every type of a GPU.

Outputs lie in poison, inputs in NaN or beside each other in a fused product. Compiling costs more than running, so
tests differ in what makes other kernels: architecture, type, width, alignment.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.rope2d import backward, norm_rope2d_q_norm_k, op, qk_norm_rope2d, reference, rope2d
from support import packs, rope
from support.compiled import by_arch, compiled_for, compiles
from support.kernels import assert_level_d, assert_same_bits, plain, random_bits, surrounded
from support.reference_models import seeded
from support.rope import EPS
from support.rope_checks import check_backward, check_forward, check_rotation, operands, places

pytestmark = [
    compiles,
    by_arch,
]

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
by_type = pytest.mark.parametrize("dtype", TYPES)
CORNERS = [(1, 1), (7, 9), (8, 8), (5, 13)]
PUBLISHED = (16, 72)  # heads and their channels


def shifted(x: Tensor) -> Tensor:
    """Return the same rows one element after a multiple of 16 bytes, an odd number of elements apart."""
    wide = torch.full((x.shape[0], x.shape[1] + 16 + (x.shape[1] + 1) % 2), torch.nan, dtype=x.dtype)
    view = wide[:, 1 : 1 + x.shape[1]]
    view.copy_(x)
    return view


# --- rotation ----------------------------------------------------------------------------------------------


@by_type
@pytest.mark.parametrize("conjugate", [False, True])
def test_rotation_has_the_bits_of_eager_pytorch(arch: int, dtype: torch.dtype, conjugate: bool) -> None:
    """Any bits, from a fused product."""
    layout = PackedLayout.from_grids(CORNERS)
    x = surrounded(random_bits(layout.num_tokens, 72, dtype=dtype, generator=seeded(1)))
    with compiled_for(arch) as gpu:
        check_rotation(x, layout, 24, conjugate)
    assert gpu.launched == {"_rotate_kernel": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_a_million_values_of_any_bits(arch: int, dtype: torch.dtype) -> None:
    """At the published width, whose dense tokens are loaded 16 bytes at a time."""
    layout = PackedLayout.from_grids([(20, 24)])
    x = random_bits(layout.num_tokens, 1152, dtype=dtype, generator=seeded(2))
    with compiled_for(arch) as gpu:
        check_rotation(x, layout, 72, False)
    assert gpu.launched == {"_rotate_kernel": 1}


def test_turning_back_in_autograd(arch: int) -> None:
    """By the public function."""
    layout = PackedLayout.from_grids([(5, 7), (1, 1)])
    generator = seeded(3)
    x, grad = (random_bits(36, 3, 24, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    at = places(layout, 24, torch.bfloat16)
    with compiled_for(arch) as gpu:
        out = rope2d(x.requires_grad_(), layout, table=at[2])
        (got,) = torch.autograd.grad(out, x, grad)
    assert gpu.launched == {"_rotate_kernel": 2}
    assert_same_bits(out, reference.rotate(x.detach(), *at))
    assert_same_bits(got, reference.rotate(grad, *at, conjugate=True))


# --- norm and rotation -------------------------------------------------------------------------------------


def check(
    arch: int,
    layout: PackedLayout,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    text: int | None,
    std: float = 1.0,
    seed: int = 5,
    config: dict[str, int] | None = None,
) -> None:
    """Forward and backward; k has ``text`` tokens without positions, or is of q's image."""
    tensors, grads = operands(layout, text, heads * dim, dtype, std, seed)
    with compiled_for(arch) as gpu:
        check_forward(tensors, layout, heads, text is None, config)
        check_backward(tensors, grads, layout, heads, text is None, config)
    some = layout.num_tokens + len(tensors[1]) > 0
    assert gpu.launched == ({"_rope2d_forward_kernel": 1, "_rope2d_backward_kernel": 1} if some else {})


@pytest.mark.parametrize(("dtype", "text"), [*((dtype, None) for dtype in TYPES), (torch.bfloat16, 7)])
def test_norm_and_rotation(arch: int, dtype: torch.dtype, text: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of three tokens, so that a program has several and the last one fewer."""
    layout = PackedLayout.from_grids(CORNERS)
    monkeypatch.setattr(backward, "MAX_PARTIALS", -(-(layout.num_tokens + (text or layout.num_tokens)) // 3))
    check(arch, layout, 3, 24, dtype, text, std=0.02 if text else 1.0)


def test_the_published_width(arch: int) -> None:
    check(arch, PackedLayout.from_grids([(3, 5), (1, 1)]), *PUBLISHED, torch.bfloat16, None)


@pytest.mark.parametrize(("grids", "text"), [([(2, 3)], 0), ([], 3), ([], 0)])
def test_tokens_of_one_kind_or_none(arch: int, grids: list[tuple[int, int]], text: int) -> None:
    check(arch, PackedLayout.from_grids(grids), 3, 24, torch.bfloat16, text)


def test_several_warps(arch: int) -> None:
    """Sums go through shared memory; a tail of one channel in eight."""
    check(arch, PackedLayout.from_grids([(2, 3), (1, 1)]), 9, 64, torch.bfloat16, None, config={"num_warps": 4})


@packs.draws(2)
@given(
    packs.grids(max_tokens=40),
    st.sampled_from([None, 0, 1, 30]),
    st.integers(1, 5),
    packs.head_dims(),
    packs.types(),
    packs.stds(),
    packs.seeds(),
)
def test_ragged_packs(
    arch: int,
    grids: list[tuple[int, int]],
    text: int | None,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    std: float,
    seed: int,
) -> None:
    check(arch, PackedLayout.from_grids(grids), heads, dim, dtype, text, std, seed)


def test_tokens_at_odd_addresses(arch: int) -> None:
    """Nothing is known to be a multiple of 16 bytes, nor are the outputs of the forward kernels."""
    from pixelflow_kernels.rope2d.forward import launch_forward
    from pixelflow_kernels.rope2d.rotation import launch_rotate

    layout = PackedLayout.from_grids([(3, 3), (1, 1)])
    tensors, grads = operands(layout, None, 72, torch.bfloat16, 1.0, 7)
    q, k = (shifted(x) for x in tensors[:2])
    weights = [shifted(w[None])[0] for w in tensors[2:]]
    at = places(layout, 24, torch.bfloat16)
    outputs = [shifted(torch.zeros_like(q)) for _ in range(3)]
    with compiled_for(arch) as gpu:
        launch_rotate(q, *at, outputs[0], 24, False)
        launch_forward(q, k, *weights, *at, *outputs[1:], 24, EPS, True)
        check_backward([q, k, *weights], [shifted(g) for g in grads], layout, 3, True)
    assert gpu.launched == {"_rotate_kernel": 1, "_rope2d_forward_kernel": 1, "_rope2d_backward_kernel": 1}
    assert_same_bits(outputs[0], reference.rotate(q.unflatten(-1, (3, 24)), *at).flatten(1))
    in_torch = plain(op._norm_rope2d)(q, k, *weights, *at, 3, EPS, True)
    truth = rope.norm_and_turn([q, k, *weights], layout, 3, True)
    for name, got, a, b in zip(("q", "k"), outputs[1:], in_torch, truth, strict=True):
        assert_level_d(got, a.flatten(1), b.flatten(1), name)


@pytest.mark.parametrize("text", [None, 5])
def test_what_training_runs(arch: int, text: int | None) -> None:
    """The public functions with autograd; weights in float32, an expanded and a transposed gradient."""
    layout = PackedLayout.from_grids([(2, 3), (1, 1)])
    tensors, _ = operands(layout, text, 72, torch.bfloat16, 1.0, 8)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    call = qk_norm_rope2d if text is None else norm_rope2d_q_norm_k
    grads = (
        torch.ones(1, 1, 1, dtype=torch.bfloat16).expand(7, 3, 24),
        torch.ones(3, 24, len(leaves[1]), dtype=torch.bfloat16).permute(2, 0, 1),
    )
    with compiled_for(arch) as gpu:
        got = call(*leaves, layout, num_heads=3)
        gradients = torch.autograd.grad(got, leaves, grads)
    assert gpu.launched == {"_rope2d_forward_kernel": 1, "_rope2d_backward_kernel": 1}
    at = places(layout, 24, torch.bfloat16)
    in_torch = plain(op._norm_rope2d)(*tensors, *at, 3, EPS, text is None)
    in_torch += plain(op._norm_rope2d_backward)(*grads, *tensors, *at, EPS, text is None)
    truth = rope.norm_and_turn(tensors, layout, 3, text is None)
    truth += rope.gradients(grads, tensors, layout, 3, text is None)
    names = ("q", "k", "grad q", "grad k", "grad q_weight", "grad k_weight")
    for name, a, b, c in zip(names, (*got, *gradients), in_torch, truth, strict=True):
        assert a.dtype == (torch.float32 if "weight" in name else torch.bfloat16)
        assert_level_d(a.detach(), b, c, name)

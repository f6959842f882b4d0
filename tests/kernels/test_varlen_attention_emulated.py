"""The attention kernels as compiled for sm_80 and sm_90, emulated: level D in every type, with the frozen tiles.

The products run as ``mma.sync`` and ``wgmma``, the loads of the loop as asynchronous copies that arrive late.
"""

from __future__ import annotations

import pytest
import torch

from pixelflow_kernels.varlen_attention import varlen_attention
from support import attention
from support.attention import TINY, TINY_BACKWARD, check, gradient_of, pack, run, run_backward
from support.compiled import compiled_for, compiles, thorough, with_products
from support.kernels import assert_same_bits

pytestmark = compiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = {"_attention_forward_kernel", "_delta_kernel", "_backward_keys_kernel", "_backward_queries_kernel"}


@with_products
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(72, BF16), (72, FP16), *(pytest.param(*other, marks=thorough) for other in ((64, BF16), (72, FP32)))],
    ids=str,
)
def test_self_attention(arch: int, dim: int, dtype: torch.dtype) -> None:
    """Members that end within a tile, at its end and after one token; one without tokens."""
    with compiled_for(arch) as gpu:
        check(pack([64, 1, 0, 129], None, 1, dim, dtype))
    assert {*gpu.launched} == KERNELS


@with_products
@pytest.mark.parametrize("odd", [pytest.param(False, marks=thorough), True])
def test_cross_attention(arch: int, odd: bool) -> None:
    """With row strides that leave no vector aligned, and with ones that do."""
    with compiled_for(arch):
        check(pack([70, 5, 3], [33, 0, 200], 2, 72, BF16, odd=odd))


@with_products
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (24, FP32),
        *(pytest.param(*other, marks=thorough) for other in ((16, FP16), (96, BF16), (128, BF16))),
    ],
)
def test_other_head_dims(arch: int, dim: int, dtype: torch.dtype) -> None:
    with compiled_for(arch):
        check(pack([33, 70], None, 1, dim, dtype), TINY, TINY_BACKWARD)


@with_products
@pytest.mark.parametrize("rising", [False, True])
def test_large_logits_outgrow_a_maximum_fixed_at_the_first_tiles(arch: int, rising: bool) -> None:
    fixed = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "FIXED_MAX_TILES": 1}
    with compiled_for(arch):
        of = pack([64, 150], None, 1, 72, BF16, largest_logit=150, rising=rising)
        out, lse = run(of, fixed)
        attention.assert_output(out, of)
        attention.assert_lse(lse, of)


@with_products
def test_a_promise_of_whole_tiles_changes_no_bits(arch: int) -> None:
    of = pack([128, 256], None, 1, 64, BF16)
    grad = gradient_of(of)
    results = []
    with compiled_for(arch):
        for multiple_of in (1, 128):
            out, lse = run(of, multiple_of=multiple_of)
            results.append([out, lse, *run_backward(of, grad, out, lse, multiple_of=multiple_of)])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@with_products
def test_a_members_bits_do_not_depend_on_the_others(arch: int) -> None:
    of = pack([40, 70, 3], None, 1, 72, BF16)
    grad, part = gradient_of(of), slice(40, 110)
    cu_seqlens = attention.cumulative([70])
    alone = attention.Pack(of.q[part], of.k[part], of.v[part], cu_seqlens, cu_seqlens, 70, 70, of.scale)
    with compiled_for(arch):
        out, lse = run(of)
        gradients = run_backward(of, grad, out, lse)
        out_alone, lse_alone = run(alone)
        gradients_alone = run_backward(alone, grad[part], out_alone, lse_alone)
    assert_same_bits(out[part], out_alone)
    assert_same_bits(lse[:, part], lse_alone)
    for a, b in zip(gradients, gradients_alone, strict=True):
        assert_same_bits(a[part], b)


@with_products
def test_what_is_not_a_number_stays_in_its_member(arch: int) -> None:
    of = pack([40, 50], None, 1, 64, BF16)
    grad = gradient_of(of)
    with compiled_for(arch):
        clean, clean_lse = run(of)
        clean_gradients = run_backward(of, grad, clean, clean_lse)
        of.k[:40] = torch.nan
        of.v[:40] = torch.inf
        out, lse = run(of)
        gradients = run_backward(of, grad, out, lse)
    assert out[:40].isnan().all()
    assert_same_bits(out[40:], clean[40:])
    for a, b in zip(gradients, clean_gradients, strict=True):
        assert_same_bits(a[40:], b[40:])


@with_products
def test_the_public_function_in_autograd(arch: int) -> None:
    of = pack([65, 30], None, 2, 72, BF16)
    grad = gradient_of(of)
    leaves = [x.detach().requires_grad_() for x in of[:3]]
    with compiled_for(arch) as gpu:
        out = varlen_attention(*leaves, *of[3:], backend="triton")
        found = torch.autograd.grad(out, leaves, grad)
    assert gpu.launched == dict.fromkeys(KERNELS, 1)
    attention.assert_output(out.detach(), of)
    attention.assert_gradients(found, of, grad)


@with_products
@thorough
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dim", [8, 24, 40, 56, 64, 72, 80, 88, 96, 104, 128, 256])
def test_every_head_dim(arch: int, dtype: torch.dtype, dim: int) -> None:
    with compiled_for(arch):
        check(pack([1, 63, 65, 130], None, 1, dim, dtype))


@with_products
@thorough
@pytest.mark.parametrize("dim", [64, 72])
def test_long_members(arch: int, dim: int) -> None:
    """Of the class of lengths whose maximum is fixed at the first tiles."""
    with compiled_for(arch):
        check(pack([2176, 40], None, 1, dim, BF16))

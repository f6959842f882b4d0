"""modulate on a CPU: the meaning against float64 and the engine's layers, gradients, registration, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.modulate import add_gated_rms_norm_modulate, layer_norm_modulate, op
from support import modulate, packs
from support.kernels import assert_same_bits
from support.modulate import EPS, VARIANTS, Operands, Variant
from support.modulate_roundings import Expected

RAGGED = [3, 1, 0, 9, 9, 2, 0]
PACKS = {"ragged": RAGGED, "one token": [1], "one image of none": [0], "empty": []}
by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


# --- meaning -----------------------------------------------------------------------------------------------


@by_variant
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("width", [8, 72, 104])
@pytest.mark.parametrize(("std", "mean"), [(1.0, 0.0), (0.02, 0.0), (0.02, 3.0)])
def test_float64_agrees_with_a_second_derivation(
    variant: Variant, lengths: list[int], width: int, std: float, mean: float
) -> None:
    layout = modulate.layout_of(lengths)
    operands = modulate.make(variant, layout, width, torch.float64, std=std, mean=mean)
    for a, b in zip(variant(operands, layout), modulate.truth(operands, layout), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * (1 + mean / std))


@by_variant
@pytest.mark.parametrize("grids", [[(2, 3), (1, 1), (2, 3)], [(3, 4), (3, 4)], []], ids=["ragged", "one run", "empty"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_are_those_of_the_engines_layers(
    variant: Variant, grids: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    layout = PackedLayout.from_grids(grids)
    for mean in (0.0, 5.0):
        operands = modulate.make(variant, layout, 144, dtype, mean=mean)
        for a, b in zip(variant(operands, layout), modulate.plain(operands, layout), strict=True):
            assert_same_bits(a, b)


@by_variant
@pytest.mark.parametrize("unused", ["nothing", "residual"])
def test_gradients_are_those_of_autograd_in_float64(variant: Variant, unused: str) -> None:
    layout = modulate.layout_of(RAGGED)
    operands = modulate.make(variant, layout, 16, torch.float64, mean=2.0)
    grads = modulate.random_grads(variant, operands)
    grads = grads if unused == "nothing" else (None, grads[1])
    got = modulate.gradients(variant, operands, layout, grads)
    expected = modulate.gradients(modulate.truth, operands, layout, grads)
    plain = modulate.gradients(modulate.plain, operands, layout, grads)
    assert [*got] == [f"grad {name}" for name in variant.names]
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(gradient, plain[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@by_variant
def test_gradcheck(variant: Variant) -> None:
    layout = modulate.layout_of([2, 0, 3])
    operands = modulate.make(variant, layout, 8, torch.float64).leaves()
    assert torch.autograd.gradcheck(lambda *tensors: variant.function(*tensors, layout), operands.given)
    if "y" in variant.names:  # the normed tokens unused
        assert torch.autograd.gradcheck(lambda *tensors: variant.function(*tensors, layout)[0], operands.given)


@packs.draws(100)
@given(
    variant=st.sampled_from([*VARIANTS.values()]),
    lengths=packs.lengths(min_length=0, max_tokens=200),
    width=st.sampled_from([8, 24, 56, 72, 200, 1152]),
    dtype=packs.types(),
    std=packs.stds(),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    seed=packs.seeds(),
)
def test_level_d(
    variant: Variant, lengths: list[int], width: int, dtype: torch.dtype, std: float, mean: float, seed: int
) -> None:
    """Gradients of what runs on a CPU; forward it is PyTorch's layers, bit by bit."""
    layout = modulate.layout_of(lengths)
    operands = modulate.make(variant, layout, width, dtype, std=std, mean=mean, seed=seed)
    grads = modulate.random_grads(variant, operands, seed + 1)
    for a, b in zip(variant(operands, layout), modulate.plain(operands, layout), strict=True):
        assert_same_bits(a, b)
    Expected(operands, layout, grads).check_gradients(modulate.gradients(variant, operands, layout, grads))


def test_rows_of_any_stride() -> None:
    """One row for all images (stride 0), and rows of one product for a whole model."""
    layout = modulate.layout_of(RAGGED)
    x = torch.randn(layout.num_tokens, 16)
    shift, scale = torch.randn(2, 1, 16)
    images = layout.num_images
    expected = layer_norm_modulate(x, shift.repeat(images, 1), scale.repeat(images, 1), layout)
    assert_same_bits(layer_norm_modulate(x, shift.expand(images, -1), scale.expand(images, -1), layout), expected)
    product = torch.zeros(images, 28 * 6 * 16)
    product[:, 32:48], product[:, 2000:2016] = shift, scale
    assert_same_bits(layer_norm_modulate(x, product[:, 32:48], product[:, 2000:2016], layout), expected)


# --- registration ------------------------------------------------------------------------------------------


@by_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(variant: Variant, dtype: torch.dtype) -> None:
    layout = modulate.layout_of([2, 0, 3])
    operands = modulate.make(variant, layout, 16, dtype)
    index = (layout.image_index, layout.cu_seqlens, EPS)
    leaves = operands.leaves()
    if "y" in variant.names:
        torch.library.opcheck(op._add_norm_modulate, (*leaves, *index))
    else:
        torch.library.opcheck(op._layer_norm_modulate, (*leaves.given, *index))
    grad_residual, grad = modulate.random_grads(variant, operands)
    y = None if operands.gate is None else operands.y
    torch.library.opcheck(
        op._backward, (grad, grad_residual, operands.x, y, operands.gate, operands.weight, operands.scale, *index)
    )


@by_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_contiguous_whatever_comes_in(variant: Variant, dtype: torch.dtype) -> None:
    layout = modulate.layout_of([2, 0, 3])
    operands = modulate.make(variant, layout, 16, dtype)
    across = [None if g is None else g.T.contiguous().T for g in modulate.random_grads(variant, operands)]
    y = None if operands.gate is None else operands.y
    arguments = (across[1], across[0], operands.x, y, operands.gate, operands.weight, operands.scale)
    arguments = (*arguments, layout.image_index, layout.cu_seqlens, EPS)
    torch.library.opcheck(op._backward, arguments)
    assert all(found.is_contiguous() for found in op._backward(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_float64_is_rounded_to_the_compute_type(dtype: torch.dtype) -> None:
    """In both directions, as the kernels load it."""
    layout = modulate.layout_of([2, 0, 3])
    single = modulate.make(VARIANTS["add_gated_rms_norm_modulate"], layout, 16, dtype)
    assert single.weight is not None
    single = single._replace(weight=single.weight.float())
    double = single._replace(weight=single.weight.double() * (1 + 2.0**-40))
    index = (layout.image_index, layout.cu_seqlens, EPS)
    grad_residual, grad = modulate.random_grads(VARIANTS["add_gated_rms_norm_modulate"], single)
    forward, backward = [], []
    for of in (single, double):
        backward.append((grad, grad_residual, of.x, of.y, of.gate, of.weight, of.scale, *index))
        forward.append((*of, *index))
    torch.library.opcheck(op._add_norm_modulate, forward[1], test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op._backward, backward[1])
    for a, b in zip(op._add_norm_modulate(*forward[1]), op._add_norm_modulate(*forward[0]), strict=True):
        assert_same_bits(a, b)
    for a, b in zip(op._backward(*backward[1]), op._backward(*backward[0]), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_under_compile(backend: str) -> None:
    """A block's chain of all variants, the last residual unused."""
    layout = PackedLayout.from_grids([(2, 3), (1, 1)])
    x = torch.randn(7, 24)
    product, weight = 0.5 * torch.randn(2, 6 * 24), torch.rand(24)

    def loss(x: Tensor, product: Tensor, weight: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = product.chunk(6, dim=-1)
        calls: dict[str, Any] = {name: variant.function for name, variant in VARIANTS.items()}
        u = calls["layer_norm_modulate"](x, shift1, scale1, layout)
        x, v = calls["add_gated_rms_norm"](x, u.sin(), gate1, weight, layout)
        x, v = calls["add_rms_norm_modulate"](x, v.sin(), weight, shift2, scale2, layout)
        x, v = calls["add_gated_rms_norm_modulate"](x, v.cos(), gate2, weight, shift2, scale2, layout)
        x, v = calls["add_gated_layer_norm_modulate"](x, v.cos(), gate1, shift1, scale2, layout)
        return v.square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, product, weight)]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 2, 8)}, "x: got shape"),
        ({"x": torch.zeros(5, 16, dtype=torch.int32)}, "x: got torch.int32"),
        ({"x": torch.zeros(16, 5).T}, "x: got channel stride 5"),
        ({"x": torch.zeros(5, 12)}, "x: got width 12"),
        ({"x": torch.zeros(5, 0)}, "x: got width 0"),
        ({"x": torch.zeros(6, 16)}, "x: got 6 tokens, expected the layout's 5"),
        ({"layout": modulate.layout_of([5], "meta")}, "layout: got device meta"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"eps": float("nan")}, "eps: got nan"),
        ({"y": torch.zeros(5, 24)}, "y: got shape"),
        ({"y": torch.zeros(5, 16, dtype=torch.float64)}, "y: got torch.float64"),
        ({"y": torch.zeros(16, 5).T}, "y: got channel stride 5"),
        ({"y": torch.zeros(5, 16, device="meta")}, "y: got device meta"),
        ({"weight": torch.zeros(1, 16)}, "weight: got shape"),
        ({"weight": torch.zeros(16, dtype=torch.int64)}, "weight: got torch.int64"),
        ({"weight": torch.zeros(32)[::2]}, "weight: got channel stride 2"),
        ({"weight": torch.zeros(16, device="meta")}, "weight: got device meta"),
        ({"gate": torch.zeros(1, 16)}, "gate: got shape"),
        ({"shift": torch.zeros(2, 8)}, "shift: got shape"),
        ({"scale": torch.zeros(16)}, "scale: got shape"),
        ({"gate": torch.zeros(2, 16, dtype=torch.bfloat16)}, "gate: got torch.bfloat16, expected torch.float32"),
        ({"shift": torch.zeros(2, 16, dtype=torch.float64)}, "shift: got torch.float64"),
        ({"scale": torch.zeros(16, 2).T}, "scale: got channel stride 2"),
        ({"scale": torch.zeros(2, 16, device="meta")}, "scale: got device meta"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    layout = modulate.layout_of([2, 3])
    variant = VARIANTS["add_gated_rms_norm_modulate"]
    arguments = modulate.make(variant, layout, 16, torch.float32)._asdict() | {"layout": layout}
    add_gated_rms_norm_modulate(**arguments)
    with pytest.raises(ValueError, match=message):
        add_gated_rms_norm_modulate(**(arguments | change))


@by_variant
def test_every_variant_looks_at_each_of_its_operands(variant: Variant) -> None:
    layout = modulate.layout_of([2, 3])
    operands = modulate.make(variant, layout, 16, torch.float32)
    for name in variant.names:
        wrong = operands._replace(**{name: torch.zeros(3, 3)})
        with pytest.raises(ValueError, match=f"{name}: got"):
            variant(wrong, layout)
    with pytest.raises(ValueError, match="eps: got"):
        variant(operands, layout, eps=-1.0)


def test_doubles_take_double_rows() -> None:
    layout = modulate.layout_of([2, 3])
    operands = modulate.make(VARIANTS["layer_norm_modulate"], layout, 16, torch.float64)
    single = Operands(*(t if name == "x" or t is None else t.float() for name, t in operands._asdict().items()))
    with pytest.raises(ValueError, match=r"shift: got torch.float32, expected torch.float64"):
        layer_norm_modulate(*single.given, layout)

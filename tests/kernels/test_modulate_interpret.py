"""The modulate kernels under Triton's interpreter, in fp32 and fp64: residual level A, norms and gradients level D.

Outputs are slices of poisoned buffers, inputs lie between NaN; the tiles are small, so that packs of a few tokens have
several runs, and runs of several lengths.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.modulate import op
from support import modulate, packs
from support.kernels import assert_filled, assert_same_bits, plain, poisoned, poisoned_like
from support.modulate import EPS, VARIANTS, Operands, Variant, forward
from support.modulate_roundings import Expected

pytestmark = pytest.mark.interpret

by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
Config = Mapping[str, int] | None


def gradients(
    variant: Variant,
    operands: Operands,
    layout: PackedLayout,
    grads: tuple[Tensor | None, Tensor],
    config: Config = None,
    sum_config: Config = None,
) -> dict[str, Tensor]:
    """By autograd through the public function, whose backward pass runs the kernels."""
    from pixelflow_kernels.modulate.backward import launch_backward

    def backward(
        grad: Tensor,
        grad_residual: Tensor | None,
        residual: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        scale: Tensor | None,
        image_index: Tensor,
        cu_seqlens: Tensor,
        eps: float,
    ) -> list[Tensor]:
        rows, *tokens = op._empty_gradients(residual, gate, scale, cu_seqlens)
        filled = [poisoned(*rows.shape, dtype=rows.dtype, dense=True), *map(poisoned_like, tokens)]
        grad_y = filled[2].out if len(filled) > 2 else None
        outputs = (filled[1].out, grad_y, filled[0].out)
        operands = (residual, y, gate, weight, scale)
        launch_backward(grad, grad_residual, *operands, cu_seqlens, *outputs, eps, config, sum_config)
        for result in filled:
            assert_filled(*result)
        return [result.out for result in filled]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_backward", backward)
        return modulate.gradients(variant, operands, layout, grads)


def assert_forward(operands: Operands, layout: PackedLayout, expected: Expected) -> None:
    residual, out = forward(operands, layout)
    assert_same_bits(residual, modulate.plain(operands, layout)[0], "residual")
    expected.check("out", out)


@st.composite
def widths(draw: st.DrawFn) -> int:
    """Small ones mostly, with and without lanes to spare; now and then heads and head dims of large models."""
    if draw(st.integers(0, 7)):
        return draw(st.sampled_from([8, 24, 56, 64, 72, 104, 200]))
    return min(draw(packs.heads()) * draw(st.sampled_from([64, 72, 80, 96, 128])), 1152)


@packs.draws(200)
@given(
    variant=st.sampled_from([*VARIANTS.values()]),
    lengths=st.lists(st.integers(0, 5 if packs.FUZZ == 1 else 65), max_size=4),
    width=widths(),
    dtype=packs.interpreted_types(),
    std=packs.stds(),
    mean=st.sampled_from([0.0, 1.0, 30.0]),
    seed=packs.seeds(),
    tokens=st.integers(1, 4),
    slots=st.sampled_from([1, 2, 4]),
)
def test_level_d(
    variant: Variant,
    lengths: list[int],
    width: int,
    dtype: torch.dtype,
    std: float,
    mean: float,
    seed: int,
    tokens: int,
    slots: int,
) -> None:
    layout = modulate.layout_of(lengths)
    operands = modulate.make(variant, layout, width, dtype, std=std, mean=mean, seed=seed)
    grads = modulate.random_grads(variant, operands, seed + 1)
    expected = Expected(operands, layout, grads)
    assert_forward(operands, layout, expected)
    config = {"TOKENS": tokens, "num_warps": 1}
    sums = {"BLOCK_SLOTS": slots, "BLOCK_CHANNELS": 16 if width < 100 else 128, "num_warps": 1}
    expected.check_gradients(gradients(variant, operands, layout, grads, config, sums))


@pytest.mark.parametrize("name", ["add_gated_layer_norm_modulate", "add_gated_rms_norm_modulate"])
def test_a_long_pack_with_the_frozen_configuration(name: str) -> None:
    variant, layout = VARIANTS[name], modulate.layout_of([32, 0, 1, 65, 200 if "rms" in name else 600])
    operands = modulate.make(variant, layout, 8, torch.float32, mean=1.0)
    grads = modulate.random_grads(variant, operands)
    Expected(operands, layout, grads).check_gradients(gradients(variant, operands, layout, grads))


@pytest.mark.parametrize("images", [128, 129, 200])
def test_more_images_than_are_looked_at_together(images: int) -> None:
    """The search for a program's image takes 128 at a time."""
    variant = VARIANTS["layer_norm_modulate"]
    lengths = [0] * images
    lengths[3], lengths[-2], lengths[-1] = 2, 3, 1
    layout = modulate.layout_of(lengths)
    operands = modulate.make(variant, layout, 8, torch.float32)
    grads = modulate.random_grads(variant, operands)
    sums = {"BLOCK_SLOTS": 4, "BLOCK_CHANNELS": 8, "num_warps": 1}
    got = gradients(variant, operands, layout, grads, {"TOKENS": 2, "num_warps": 1}, sums)
    Expected(operands, layout, grads).check_gradients(got)


def test_a_large_mean_costs_nothing() -> None:
    """LayerNorm of tokens whose mean is 50000 times their spread: no more than six roundings, whatever PyTorch has."""
    variant, layout = VARIANTS["layer_norm_modulate"], modulate.layout_of([2, 3])
    operands = modulate.make(variant, layout, 104, torch.float32, std=0.02, mean=1000.0)
    grads = modulate.random_grads(variant, operands)
    found = {"out": forward(operands, layout)[1], **gradients(variant, operands, layout, grads)}
    truth = modulate.gradients(modulate.truth, operands, layout, grads, torch.float64)
    truth["out"] = modulate.truth(operands, layout)[1]
    for name, size in modulate.sizes(operands, layout, grads).items():
        if name in found:
            error = (found[name].double() - truth[name]).abs().max().item()
            assert error <= torch.finfo(torch.float32).eps * size, f"{name}: error {error:.3e}, size {size:.3g}"


@by_variant
def test_unused_residual(variant: Variant) -> None:
    layout = modulate.layout_of([2, 3])
    operands = modulate.make(variant, layout, 24, torch.float32)
    grads = (None, modulate.random_grads(variant, operands)[1])
    Expected(operands, layout, grads).check_gradients(gradients(variant, operands, layout, grads))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, about infinities put in on purpose
def test_residual_bits_of_special_values(gated: bool) -> None:
    layout = modulate.layout_of([7, 7])
    variant = VARIANTS["add_gated_rms_norm_modulate" if gated else "add_rms_norm_modulate"]
    operands = modulate.make(variant, layout, 8, torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, 3e38, -1.0])
    x, y, gate = special.repeat(14, 1), special.roll(1).repeat(14, 1), special[[1, 7]][:, None].repeat(1, 8)
    for shift in range(7):
        x[shift], y[shift + 7] = special.roll(shift), special.roll(shift)
    operands = operands._replace(x=x, y=y, gate=gate if gated else None)
    assert_same_bits(forward(operands, layout)[0], modulate.plain(operands, layout)[0])


@by_variant
def test_an_image_does_not_depend_on_its_batch_mates(variant: Variant) -> None:
    """Bits of its tokens, their gradients and its rows' gradients: alone, and in the midst of others."""
    config = {"TOKENS": 3, "num_warps": 1}
    alone, among = modulate.layout_of([8]), modulate.layout_of([2, 0, 8, 4])
    operands = modulate.make(variant, among, 24, torch.float32)
    grads = modulate.random_grads(variant, operands)
    tokens, image = slice(2, 10), slice(2, 3)
    part = Operands(
        *(
            None if t is None else t if name == "weight" else t[tokens if name in "xy" else image]
            for name, t in operands._asdict().items()
        )
    )
    part_grads = (None if grads[0] is None else grads[0][tokens], grads[1][tokens])
    for a, b in zip(forward(part, alone), forward(operands, among), strict=True):
        assert_same_bits(a, b[tokens])
    got = gradients(variant, part, alone, part_grads, config)
    expected = gradients(variant, operands, among, grads, config)
    for name, gradient in got.items():
        if name != "grad weight":
            whole = expected[name]
            assert_same_bits(gradient, whole[tokens if name in ("grad x", "grad y") else image], name)


@by_variant
@pytest.mark.parametrize("lengths", [[1, 2], [0], []], ids=["two images", "no token", "no image"])
def test_what_a_cuda_call_runs(variant: Variant, lengths: list[int]) -> None:
    """The CUDA implementations end to end: a published width, expanded and transposed gradients, packs of nothing."""
    layout = modulate.layout_of(lengths)
    operands = modulate.make(variant, layout, 1152, torch.float32)
    x, y, gate, weight, _, scale = operands
    index = (layout.image_index, layout.cu_seqlens, EPS)
    if y is None:
        launched = (x, op._launch_layer_norm_modulate(*operands.given, *index))
    else:
        launched = op._launch_add_norm_modulate(*operands, *index)
    for a, b in zip(launched, modulate.plain(operands, layout), strict=True):
        assert a.is_contiguous() or a is x
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads = torch.ones(1, 1).expand(layout.num_tokens, 1152), torch.ones(1152, layout.num_tokens).T
    arguments = (grads[0], None if y is None else grads[1], x, None if gate is None else y, gate, weight, scale, *index)
    got, expected = op._launch_backward(*arguments), plain(op._backward)(*arguments)
    assert [t.shape for t in got] == [t.shape for t in op._fake_backward(*arguments)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert layout.num_tokens > 0 or not a.any()

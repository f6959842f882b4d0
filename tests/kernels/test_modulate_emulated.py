"""The modulate kernels as compiled, emulated: residual level A, norms and gradients level D, in every type."""

from __future__ import annotations

import pytest
import torch

from support import modulate
from support.compiled import by_arch, compiled_for, compiles
from support.kernels import assert_same_bits
from support.modulate import VARIANTS, Variant, forward
from support.modulate_roundings import Expected

pytestmark = compiles

by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
RAGGED = [1, 0, 33, 65, 0, 31]


def check(arch: int, variant: Variant, width: int, dtype: torch.dtype, std: float = 1.0, mean: float = 0.0) -> None:
    """With the frozen configurations, forward and backward, against float64."""
    layout = modulate.layout_of(RAGGED)
    operands = modulate.make(variant, layout, width, dtype, std=std, mean=mean)
    grads = modulate.random_grads(variant, operands)
    expected = Expected(operands, layout, grads)
    with compiled_for(arch) as gpu:
        residual, out = forward(operands, layout)
        got = modulate.gradients(variant, operands, layout, grads)
    assert gpu.launched == {"_modulate_forward_kernel": 2, "_modulate_backward_kernel": 1, "_sum_kernel": 1}
    assert_same_bits(residual, modulate.plain(operands, layout)[0], "residual")
    expected.check("out", out)
    expected.check_gradients(got)


@by_arch
@by_variant
def test_every_variant(arch: int, variant: Variant) -> None:
    check(arch, variant, 144, torch.bfloat16)


@by_arch
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_types(arch: int, dtype: torch.dtype) -> None:
    check(arch, VARIANTS["add_gated_rms_norm_modulate"], 144, dtype)


@by_arch
@pytest.mark.parametrize("width", [8, 104, 1152, 2048])
def test_widths(arch: int, width: int) -> None:
    """Of tiles with lanes to spare, of the published model, and of more channels than a warp holds."""
    check(arch, VARIANTS["add_gated_rms_norm_modulate"], width, torch.bfloat16, std=0.02, mean=0.5)


@by_arch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_residual_bits_of_special_values(arch: int, dtype: torch.dtype) -> None:
    layout = modulate.layout_of([40, 24])
    variant = VARIANTS["add_gated_rms_norm_modulate"]
    operands = modulate.make(variant, layout, 1152, dtype)
    assert operands.y is not None
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, -1e-7, 3e38]).to(dtype)
    for column in range(64):
        operands.x[::7, column] = special[column % 8]
        operands.y[::7, column] = special[column // 8]
    with compiled_for(arch):
        residual, _ = forward(operands, layout)
    assert_same_bits(residual, modulate.plain(operands, layout)[0])


@by_arch
@pytest.mark.parametrize("variant", [VARIANTS["add_gated_rms_norm_modulate"], VARIANTS["layer_norm_modulate"]])
def test_an_image_does_not_depend_on_its_batch_mates(arch: int, variant: Variant) -> None:
    """Bits of its tokens and of their gradients: alone, and in the midst of others."""
    among, alone = modulate.layout_of([45, 0, 80, 7]), modulate.layout_of([80])
    operands = modulate.make(variant, among, 144, torch.bfloat16)
    grads = modulate.random_grads(variant, operands)
    tokens, image = slice(45, 125), slice(2, 3)
    part = modulate.Operands(
        *(
            None if t is None else t if name == "weight" else t[tokens if name in "xy" else image]
            for name, t in operands._asdict().items()
        )
    )
    part_grads = (None if grads[0] is None else grads[0][tokens], grads[1][tokens])
    with compiled_for(arch):
        for a, b in zip(forward(operands, among), forward(part, alone), strict=True):
            assert_same_bits(a[tokens], b)
        got = modulate.gradients(variant, operands, among, grads)
        for name, gradient in modulate.gradients(variant, part, alone, part_grads).items():
            if name != "grad weight":
                assert_same_bits(got[name][tokens if name in ("grad x", "grad y") else image], gradient, name)

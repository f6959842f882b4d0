"""The compiled modulate kernels on a device: residual level A, norms and gradients level D, packs up to 16k tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixelflow_kernels import PackedLayout
from pixelflow_kernels.modulate import op
from support import modulate
from support.kernels import assert_filled, assert_same_bits, poisoned, poisoned_like
from support.modulate import EPS, VARIANTS, Operands, Variant, forward
from support.modulate_roundings import Expected

pytestmark = pytest.mark.gpu

PACKS = {
    "ragged": [1, 63, 0, 64, 65, 600, 0, 31, 33, 4096],
    "16k tokens": [4096] * 4,
    "one token": [1],
    "one image of none": [0],
    "empty": [],
}
WIDTHS = [8, 104, 144, 1024, 1152, 2048]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
by_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def on_device(x: Tensor) -> Tensor:
    """A copy with the same strides, at a storage offset of its own: slices stay slices."""
    base = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device="cuda")
    base.copy_(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()))
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


@by_variant
@by_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_forward_and_gradients(variant: Variant, dtype: torch.dtype, width: int, lengths: list[int]) -> None:
    """Against the CPU's float64, level D; twice the same bits."""
    while sum(lengths) * width > 3_000_000:  # the CPU's float64 must have an end
        lengths = [n // 2 for n in lengths]
    layout, on_gpu = modulate.layout_of(lengths), modulate.layout_of(lengths, "cuda")
    for std, mean in ((1.0, 0.0), (0.02, 0.5)):
        operands = modulate.make(variant, layout, width, dtype, std=std, mean=mean)
        grads = modulate.random_grads(variant, operands)
        expected = Expected(operands, layout, grads)
        there = operands.map(on_device)
        there_grads = (None if grads[0] is None else on_device(grads[0]), on_device(grads[1]))

        residual, out = variant(there, on_gpu)
        for a, b in zip(forward(there, on_gpu), (residual, out), strict=True):
            assert_same_bits(a, b, "outputs of another stride")
        assert_same_bits(residual.cpu(), modulate.plain(operands, layout)[0], "residual")
        expected.check("out", out.cpu())
        got = modulate.gradients(variant, there, on_gpu, there_grads)
        again = modulate.gradients(variant, there, on_gpu, there_grads)
        for name, gradient in got.items():
            assert_same_bits(gradient, again[name], f"{name}, a second time")
        expected.check_gradients({name: gradient.cpu() for name, gradient in got.items()})


@by_variant
def test_float64(variant: Variant) -> None:
    lengths = PACKS["ragged"][:-1]
    layout, on_gpu = modulate.layout_of(lengths), modulate.layout_of(lengths, "cuda")
    operands = modulate.make(variant, layout, 72, torch.float64)
    grads = modulate.random_grads(variant, operands)
    there = operands.map(on_device)
    torch.testing.assert_close(variant(there, on_gpu)[1].cpu(), modulate.truth(operands, layout)[1], rtol=0, atol=1e-11)
    there_grads = (None if grads[0] is None else on_device(grads[0]), on_device(grads[1]))
    got = modulate.gradients(variant, there, on_gpu, there_grads)
    for name, expected in modulate.gradients(modulate.truth, operands, layout, grads).items():
        torch.testing.assert_close(got[name].cpu(), expected, rtol=0, atol=1e-9)


@by_dtype
@pytest.mark.parametrize("gated", [True, False])
def test_residual_bits_of_special_values(dtype: torch.dtype, gated: bool) -> None:
    """Against eager PyTorch on the same device, over more than 10^7 values."""
    layout = modulate.layout_of([4096, 4096, 1504], "cuda")
    variant = VARIANTS["add_gated_rms_norm_modulate" if gated else "add_rms_norm_modulate"]
    operands = modulate.make(variant, modulate.layout_of([4096, 4096, 1504]), 1152, dtype).map(on_device)
    assert operands.y is not None
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-42, -1e-7, 3e38], device="cuda").to(dtype)
    for column in range(64):
        operands.x[::7, column] = special[column % 8]
        operands.y[::7, column] = special[column // 8]
    residual, _ = variant(operands, layout)
    assert residual.numel() > 10**7
    assert_same_bits(residual, modulate.plain(operands, layout)[0])


@by_variant
@by_dtype
def test_backward_fills_its_outputs_alone(variant: Variant, dtype: torch.dtype) -> None:
    from pixelflow_kernels.modulate.backward import launch_backward

    layout = modulate.layout_of([70, 0, 5], "cuda")
    operands = modulate.make(variant, modulate.layout_of([70, 0, 5]), 1152, dtype)
    x, y, gate, weight, _, scale = operands.map(on_device)
    grad_residual, grad = (None if g is None else on_device(g) for g in modulate.random_grads(variant, operands))
    assert grad is not None
    y = None if gate is None else y
    arguments = (grad, grad_residual, x, y, gate, weight, scale)
    expected = op._backward(*arguments, layout.image_index, layout.cu_seqlens, EPS)
    filled = [poisoned(*expected[0].shape, dtype=torch.float32, device="cuda", dense=True)]
    filled += [poisoned_like(t) for t in expected[1:]]
    grad_y = filled[2].out if len(filled) > 2 else None
    launch_backward(*arguments, layout.cu_seqlens, filled[1].out, grad_y, filled[0].out, EPS)
    for result, tensor in zip(filled, expected, strict=True):
        assert_filled(*result)
        assert_same_bits(result.out, tensor)


@by_variant
@by_dtype
def test_an_image_does_not_depend_on_its_batch_mates(variant: Variant, dtype: torch.dtype) -> None:
    """Bits of its tokens, their gradients and its rows' gradients: alone, and in the midst of others."""
    alone, among = modulate.layout_of([300], "cuda"), modulate.layout_of([45, 0, 300, 77], "cuda")
    operands = modulate.make(variant, modulate.layout_of([45, 0, 300, 77]), 1152, dtype)
    grads = modulate.random_grads(variant, operands)
    operands, (of_residual, grad) = operands.map(on_device), (None if g is None else on_device(g) for g in grads)
    assert grad is not None
    tokens, image = slice(45, 345), slice(2, 3)
    part = Operands(
        *(
            None if t is None else t if name == "weight" else t[tokens if name in "xy" else image]
            for name, t in operands._asdict().items()
        )
    )
    for a, b in zip(variant(part, alone), variant(operands, among), strict=True):
        assert_same_bits(a, b[tokens])
    part_grads = (None if of_residual is None else of_residual[tokens], grad[tokens])
    got = modulate.gradients(variant, part, alone, part_grads)
    expected = modulate.gradients(variant, operands, among, (of_residual, grad))
    for name, gradient in got.items():
        if name != "grad weight":
            whole = expected[name]
            assert_same_bits(gradient, whole[tokens if name in ("grad x", "grad y") else image], name)


@by_variant
def test_one_graph_under_compile(variant: Variant) -> None:
    layout = PackedLayout.from_grids([(8, 8), (3, 5)], device="cuda")
    operands = modulate.make(variant, PackedLayout.from_grids([(8, 8), (3, 5)]), 144, torch.bfloat16).map(on_device)
    grads = tuple(torch.ones_like(operands.x) for _ in range(2))
    pair = grads if "y" in variant.names else (None, grads[1])
    plain = modulate.gradients(variant, operands, layout, pair)
    compiled = torch.compile(lambda *tensors: variant.function(*tensors, layout), fullgraph=True)

    def function(leaves: Operands, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        out = compiled(*leaves.given)
        return out if isinstance(out, tuple) else (leaves.x, out)

    got = modulate.gradients(function, operands, layout, pair)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-2, atol=1e-2)


def test_operations_register_no_host_synchronisation() -> None:
    variant = VARIANTS["add_gated_layer_norm_modulate"]
    lengths = [64, 1, 65]
    layout = modulate.layout_of(lengths, "cuda")
    operands = modulate.make(variant, modulate.layout_of(lengths), 1152, torch.bfloat16).map(on_device)
    grads = tuple(torch.ones_like(operands.x) for _ in range(2))
    modulate.gradients(variant, operands, layout, grads)  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        modulate.gradients(variant, operands, layout, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")

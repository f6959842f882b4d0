"""The whole fast engine on its kernels as compiled for sm_80 and sm_90, emulated: level D against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request, SamplingOutput
from support.cascades import checkpoint_of
from support.compiled import compiled_for, compiles, thorough, with_products
from support.kernels import assert_level_d
from support.reference_models import normal, random_reference, seeded

pytestmark = compiles

BF16, FP64 = torch.bfloat16, torch.float64
BLOCK = {"_modulate_forward_kernel", "_rope2d_forward_kernel", "_attention_forward_kernel"}


def states(engine: PixelFlowEngine, labels: Any, **options: Any) -> list[Tensor]:
    """Every image's state at the end of every stage."""
    found: list[Tensor] = []
    engine(labels, callback_on_stage_end=lambda e: found.extend(e.latents), output_type="pt", **options)
    return found


def images(engine: PixelFlowEngine, labels: Any, **options: Any) -> list[Tensor]:
    return list(engine(labels, output_type="pt", **options).images)


def assert_close(got: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """Kernels are as close to float64 as plain PyTorch in the same type."""
    for i, (x, y, z) in enumerate(zip(got, plain, truth, strict=True)):
        assert_level_d(x, y, z.double(), f"state {i}")


def digits(dtype: torch.dtype, backend: str) -> PixelFlowEngine:
    return PixelFlowEngine.from_pretrained("digits", "cpu", dtype, backend)


@with_products
@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float32, marks=thorough)])
def test_digits(arch: int, dtype: torch.dtype) -> None:
    """The bundled model, as a user calls it."""
    options = {"seed": [1, 2], "num_inference_steps": [2, 2, 2], "guidance_scale": 2.4}
    with compiled_for(arch) as gpu:
        got = states(digits(dtype, "triton"), [3, 7], **options)
    assert {*gpu.launched} == BLOCK | {"_euler_kernel", "_renoise_kernel"}
    plain, truth = (states(digits(other, "torch"), [3, 7], **options) for other in (dtype, FP64))
    assert_close(got, plain, truth)


@with_products
def test_prompts_images_of_several_sizes_and_weights(arch: int) -> None:
    model = random_reference(64, heads=1, head_dim=24, depth=2, num_classes=0, cross_attention_dim=12)
    text = normal((4, 9, 12), seeded(65), torch.float32)
    several = [(8, 16, 3.0, 2), (8, 8, 1.0, 9), (16, 8, 2.0, 1)]
    requests = [
        Request(seed=i, guidance_scale=w, height=h, width=v, encoder_hidden_states=text[i, :n])
        for i, (h, v, w, n) in enumerate(several)
    ]

    def engine(dtype: torch.dtype, backend: str) -> PixelFlowEngine:
        return PixelFlowEngine.from_checkpoint(checkpoint_of(model, 2, 8), "cpu", dtype, backend)

    options = {
        "num_inference_steps": 2,
        "null_encoder_hidden_states": text[3:],
        "null_encoder_attention_mask": torch.tensor([[1, 1, 1, *[0] * 6]]),
    }
    with compiled_for(arch) as gpu:
        got = images(engine(BF16, "triton"), requests, solver="heun", **options)
    assert {*gpu.launched} > BLOCK | {"_renoise_kernel"}
    plain, truth = (images(engine(other, "torch"), requests, solver="heun", **options) for other in (BF16, FP64))
    assert_close(got, plain, truth)


@with_products
def test_dopri5(arch: int) -> None:
    """The device decides on as many attempts as plain PyTorch takes; images agree to what the tolerance leaves open."""
    model = random_reference(61, heads=1, head_dim=24, depth=1)
    model.proj_out_2.weight.mul_(0.3)  # so that few attempts do
    options = {"solver": "dopri5", "rtol": 1.0, "atol": 1.0, "seed": [3, 4], "guidance_scale": 2.4}

    def sampled(backend: str) -> SamplingOutput:
        engine = PixelFlowEngine.from_checkpoint(checkpoint_of(model, 2, 8), "cpu", torch.float32, backend)
        return engine([1, 5], output_type="pt", **options)

    plain = sampled("torch")
    with compiled_for(arch) as gpu:
        got = sampled("triton")
    assert {*gpu.launched} > BLOCK | {"_begin_kernel", "_stage_kernel", "_error_kernel", "_end_kernel"}
    assert got.statuses == plain.statuses
    assert [stage.evaluations for stage in got.stages] == [stage.evaluations for stage in plain.stages]
    assert (got.images - plain.images).abs().max() <= 1e-3


@with_products
def test_gradients_of_the_velocity(arch: int) -> None:
    """Through every kernel's backward pass, to the pixels."""
    g = seeded(67)
    x, direction = normal((2, 3, 16, 8), g), normal((2, 3, 16, 8), g)

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = x.to(dtype).requires_grad_()
        out = digits(dtype, backend).velocity(leaf, 700.0, class_labels=[3, 7])
        return torch.autograd.grad(out, leaf, direction.to(out.dtype))[0]

    with compiled_for(arch) as gpu:
        got = gradient(BF16, "triton")
    backward = {"_modulate_backward_kernel", "_rope2d_backward_kernel", "_backward_keys_kernel", "_delta_kernel"}
    assert backward < {*gpu.launched}
    assert_level_d(got, gradient(BF16, "torch"), gradient(FP64, "torch"))

"""The whole fast engine with its Triton kernels under the interpreter, in float32: level D against float64.

A program instance costs milliseconds there, and most kernels have one per token: images are of 8 pixels, and few.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import Checkpoint, PixelFlowEngine, Request
from pixelflow_engine.reference import PixelFlowTransformer
from support.cascades import U32, Picture, cascade, checkpoint_of, exact_engine
from support.reference_models import normal, random_reference, seeded

pytestmark = pytest.mark.interpret


def fused(checkpoint: Checkpoint) -> PixelFlowEngine:
    engine = PixelFlowEngine.from_checkpoint(checkpoint, backend="triton")
    assert not engine.exact
    assert engine.backend.name == "triton"
    return engine


def ends(engine: PixelFlowEngine, labels: Any, **options: Any) -> list[list[Tensor]]:
    """The state of every image at the end of every stage."""
    states: list[list[Tensor]] = []
    engine(labels, callback_on_stage_end=lambda e: states.append(list(e.latents)), output_type="pt", **options)
    return states


def assert_close(got: Tensor, truth: Tensor, reference: Tensor, roundings: int) -> None:
    """Level D: at most twice as far from float64 as the reference in float32, and some roundings."""
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    bound = 2 * (reference - truth).abs().max().item() + roundings * U32 * truth.abs().max().item()
    error = (got - truth).abs().max().item()
    assert error <= bound, f"off by {error:.1e}, allowed {bound:.1e}"


def assert_cascades(
    model: PixelFlowTransformer, pictures: list[Picture], states: list[list[Tensor]], steps: list[int], solver: str
) -> None:
    """Every image at the end of every stage is the one that the reference makes alone."""
    truth = [cascade(model.double(), picture, steps, solver) for picture in pictures]
    plain = [cascade(model.float(), picture, steps, solver) for picture in pictures]
    assert len(states) == len(steps)
    for stage, images in enumerate(states):
        for i, image in enumerate(images):
            assert_close(image, truth[i][stage], plain[i][stage], 8 * sum(steps))


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_classes_with_guidance(solver: str) -> None:
    model = random_reference(60, depth=1)
    steps = [1, 1] if solver == "euler" else [2]
    side = 8 if solver == "euler" else 4
    states = ends(
        fused(checkpoint_of(model, len(steps), side)), [1, 5], seed=[3, 4], solver=solver, num_inference_steps=steps
    )
    weights = [1.0, 2.4] if solver == "euler" else [2.4]
    pictures = [
        Picture(height=side, width=side, seed=seed, weights=weights, label=label) for label, seed in ((1, 3), (5, 4))
    ]
    assert_cascades(model, pictures, states, steps, solver)


@pytest.mark.parametrize(("error_norm", "scale"), [("image", 2.4), ("batch", 1.0)])
def test_classes_by_dopri5(error_norm: str, scale: float) -> None:
    """The same decisions as plain PyTorch in float32, from values that differ in their last bits."""
    model = random_reference(61, depth=1)
    model.proj_out_2.weight.mul_(0.3)  # so that few attempts do
    checkpoint = checkpoint_of(model, 1, 4)
    options = {"solver": "dopri5", "rtol": 1.0, "atol": 1.0, "error_norm": error_norm, "seed": [3, 4]}
    options["guidance_scale"] = scale
    (got,) = ends(fused(checkpoint), [1, 5], **options)
    (plain,) = ends(exact_engine(checkpoint), [1, 5], **options)
    for x, y in zip(got, plain, strict=True):
        # An estimate of the error is a difference of slopes: its last bits move the steps, and the steps the state by
        # what the tolerance leaves open.
        assert (x - y).abs().max() <= 1e-3 * y.abs().max()


def test_prompts_of_several_lengths_with_padding() -> None:
    model = random_reference(62, depth=2, num_classes=0, cross_attention_dim=12)
    text = normal((4, 5, 12), seeded(63), torch.float32)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])  # the last is padding alone
    null_mask = torch.tensor([[1, 0, 0, 0, 0]])
    states = ends(
        fused(checkpoint_of(model, 1, 4)),
        None,
        seed=[3, 4, 5],
        num_inference_steps=2,
        encoder_hidden_states=text[:3],
        encoder_attention_mask=mask,
        null_encoder_hidden_states=text[3:],
        null_encoder_attention_mask=null_mask,
    )
    pictures = [
        Picture(height=4, width=4, seed=seed, weights=[2.4], prompt=text[i, :length], null=text[3, :1])
        for i, (seed, length) in enumerate(((3, 5), (4, 2), (5, 5)))
    ]
    assert_cascades(model, pictures, states, [2], "euler")


def test_images_of_several_sizes_weights_and_prompts() -> None:
    model = random_reference(64, depth=1, cross_attention_dim=12)
    text = normal((4, 4, 12), seeded(65), torch.float32)
    several = [(4, 8, 3.0, 2), (4, 4, 1.0, 4), (8, 4, 2.0, 1)]
    requests = [
        Request(class_label=i, seed=i, guidance_scale=w, height=h, width=v, encoder_hidden_states=text[i, :n])
        for i, (h, v, w, n) in enumerate(several)
    ]
    states = ends(
        fused(checkpoint_of(model, 1, 4)),
        requests,
        num_inference_steps=1,
        solver="heun",
        null_encoder_hidden_states=text[3:],
        null_encoder_attention_mask=torch.tensor([[1, 1, 1, 0]]),
    )
    pictures = [
        Picture(height=h, width=v, seed=i, weights=[w], label=i, prompt=text[i, :n], null=text[3, :3])
        for i, (h, v, w, n) in enumerate(several)
    ]
    assert_cascades(model, pictures, states, [1], "heun")


@pytest.mark.parametrize("kind", ["class", "text"])
def test_gradients_of_the_velocity(kind: str) -> None:
    """Through every kernel's backward pass, to the pixels."""
    shape: dict[str, Any] = {} if kind == "class" else {"num_classes": 0, "cross_attention_dim": 12}
    model = random_reference(66, depth=2, **shape)
    g = seeded(67)
    x, direction = normal((2, 3, 4, 6), g), normal((2, 3, 4, 6), g)
    states, mask = normal((2, 4, 12), g, torch.float32), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    times = torch.tensor([100.0, 900.5])
    conditions: dict[str, Any] = {"class_labels": torch.tensor([1, 4])}
    if kind == "text":
        conditions = {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def both(field: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        y = x.to(dtype).requires_grad_()
        v = field(y)
        (v * direction.to(dtype)).sum().backward()
        assert y.grad is not None
        return v.detach(), y.grad

    def reference(y: Tensor) -> Tensor:
        own = {k: v.to(y.dtype) if v.is_floating_point() else v for k, v in conditions.items()}
        return model.to(y.dtype)(y, times, **own)

    engine = fused(checkpoint_of(model, 1, 4))
    got = both(lambda y: engine.velocity(y, times, **conditions), torch.float32)
    plain, truth = both(reference, torch.float32), both(reference, torch.float64)
    for a, b, c in zip(got, truth, plain, strict=True):
        assert_close(a, b, c, 16)
    assert truth[1].abs().max() > 0.01
    assert all(p.grad is None and not p.requires_grad for p in engine.model.parameters())

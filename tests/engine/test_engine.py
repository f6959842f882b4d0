"""What a caller of the engine sees: velocities, outputs, reports, callbacks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from pixelflow_engine import (
    BackendUnavailableError,
    Checkpoint,
    ConvergenceError,
    ModelConfig,
    PixelFlowConfig,
    PixelFlowEngine,
    SchedulerConfig,
    StageEvent,
    StepEvent,
)
from pixelflow_engine.reference import PixelFlowTransformer
from support.reference_models import normal, random_reference, seeded


def pair(
    seed: int = 1, stages: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[PixelFlowTransformer, PixelFlowEngine]:
    """A random reference model and an engine with its weights: patch 2, 16 px, five classes."""
    model = random_reference(seed, dtype=dtype)
    config = PixelFlowConfig(
        model=ModelConfig(num_attention_heads=2, attention_head_dim=8, depth=2, patch_size=2, num_classes=5),
        scheduler=SchedulerConfig(num_stages=3),
        resolution=16,
    )
    return model, PixelFlowEngine.from_checkpoint(Checkpoint(config, model.state_dict(), "random"), dtype=dtype)


def test_velocity_is_the_models_and_takes_what_foreign_samplers_have() -> None:
    model, engine = pair()
    g = seeded(2)
    x = normal((3, 3, 8, 12), g, torch.float32)
    times = torch.tensor([0.0, 333.3, 999.0])
    labels = [0, 5, 2]
    tensor = torch.tensor(labels)
    assert torch.equal(engine.velocity(x, times, class_labels=labels), model(x, times, tensor))
    shared = engine.velocity(x, 7.5, class_labels=labels, latent_size=4)
    assert torch.equal(shared, model(x, torch.full((3,), 7.5), tensor, latent_size=4))
    sizes = torch.tensor([4, 8, 16])
    assert torch.equal(
        engine.velocity(x, 7.5, class_labels=tensor, latent_size=sizes),
        model(x, torch.full((3,), 7.5), tensor, latent_size=sizes),
    )
    assert engine.velocity(x.double(), 7.5, class_labels=labels).dtype == torch.float64


def test_velocity_is_differentiable_in_x_as_the_reference_is() -> None:
    model, engine = pair(dtype=torch.float64)
    g = seeded(3)
    x, direction = normal((2, 3, 4, 6), g), normal((2, 3, 4, 6), g)
    labels = torch.tensor([1, 4])
    gradients = []
    for field in (
        lambda y: engine.velocity(y, 100.0, class_labels=labels),
        lambda y: model(y, torch.full((2,), 100.0), labels),
    ):
        y = x.clone().requires_grad_()
        (field(y) * direction).sum().backward()
        assert y.grad is not None
        gradients.append(y.grad)
    # Same operations in another order of summation: a few hundred roundings of values near 1.
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12 * gradients[1].abs().max()
    assert gradients[0].abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in engine.model.parameters())


def test_its_repr_says_what_it_samples_and_on_what_it_runs() -> None:
    engine = PixelFlowEngine.from_pretrained("digits", dtype=torch.bfloat16, backend="torch")
    said = "PixelFlowEngine(32 px in 3 stages, cpu, bfloat16, backend='torch', compile=False, graphs=False)"
    assert repr(engine) == said


def test_output_types_are_one_image_in_three_forms() -> None:
    _, engine = pair()
    array = engine([1, 2], output_type="np", num_inference_steps=2).images
    tensor = engine([1, 2], output_type="pt", num_inference_steps=2).images
    pictures = engine([1, 2], num_inference_steps=2).images
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert array.shape == (2, 16, 16, 3)
    assert array.dtype == np.float32
    assert array.min() >= 0
    assert array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    for picture, image in zip(pictures, array, strict=True):
        assert isinstance(picture, Image.Image)
        assert np.array_equal(np.asarray(picture), np.rint(image * 255).astype(np.uint8))


def test_seeds_say_how_to_draw_an_image_again() -> None:
    _, engine = pair()
    out = engine([1, 2, 3], seed=2**64 - 2, num_inference_steps=1)
    assert out.seeds == (2**64 - 2, 2**64 - 1, 0)
    again = engine([3], seed=[out.seeds[2]], num_inference_steps=1, output_type="np").images
    batch = engine([1, 2, 3], seed=out.seeds, num_inference_steps=1, output_type="np").images
    assert np.allclose(np.asarray(again)[0], np.asarray(batch)[2], atol=1e-5)
    fresh = engine([1, 2], seed=None, num_inference_steps=1)
    assert len(set(fresh.seeds)) == 2
    assert engine([1], noise="public", seed=4, num_inference_steps=1).seeds == (4,)
    assert engine([1], noise="public", seed=None, num_inference_steps=1).seeds == ()


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_reports_and_callbacks_tell_what_happened(solver: str) -> None:
    _, engine = pair()
    calls: list[int] = []
    engine.model.register_forward_pre_hook(lambda _, args: calls.append(args[2].num_images))
    steps: list[StepEvent] = []
    ends: list[StageEvent] = []
    out = engine(
        [1, 2],
        solver=solver,  # type: ignore[arg-type]
        num_inference_steps=[3, 1, 2],
        guidance_schedule=[1.0, 2.0, 3.0],
        height=32,
        width=8,
        callback_on_step_end=steps.append,
        callback_on_stage_end=ends.append,
    )
    assert [(s.stage, s.height, s.width, s.tokens) for s in out.stages] == [
        (0, 8, 2, 4),
        (1, 16, 4, 16),
        (2, 32, 8, 64),
    ]
    assert [s.guidance_weight for s in out.stages] == [1.0, 2.0, 3.0]
    assert sum(s.evaluations for s in out.stages) == len(calls)
    first = out.stages[0].evaluations
    assert set(calls[:first]) == {2}, "no null half at weight 1"
    assert set(calls[first:]) == {4}
    assert [s.steps for s in out.stages] == [sum(e.stage == i for e in steps) for i in range(3)]
    if solver == "euler":
        assert [s.evaluations for s in out.stages] == [3, 1, 2]
    else:
        assert [s.evaluations for s in out.stages] == [2 + 6 * s.steps for s in out.stages]
    assert [e.report for e in ends] == list(out.stages)
    for stage in range(3):
        events = [e for e in steps if e.stage == stage]
        assert [e.step for e in events] == list(range(len(events)))
        assert all(a.tau <= b.tau for a, b in pairwise(events))
        assert events[-1].tau == 1
        assert torch.equal(events[-1].latents, ends[stage].latents)
        assert events[-1].latents.shape == (2, 3, out.stages[stage].height, out.stages[stage].width)
    assert all(s.seconds > 0 for s in out.stages)


def test_dopri5_is_where_euler_goes_with_many_steps() -> None:
    _, engine = pair(dtype=torch.float64)

    def ends(**options: object) -> torch.Tensor:
        last: list[torch.Tensor] = []
        engine([1], height=8, width=8, callback_on_stage_end=lambda e: last.append(e.latents), **options)  # type: ignore[arg-type]
        return last[0]

    exact = ends(solver="dopri5", rtol=1e-6, atol=1e-8)
    size = exact.abs().max().item()
    errors = [(ends(num_inference_steps=n) - exact).abs().max().item() for n in (20, 80)]
    # First order. In the end they differ a little: Euler's model time reaches its window's end at tau = 0.999, not 1.
    assert errors[0] > 2 * errors[1]
    assert errors[1] < 2e-2 * size, (errors, size)
    assert (ends(solver="dopri5") - exact).abs().max().item() < 1e-2 * size


def test_a_square_is_the_same_by_name_and_by_default() -> None:
    _, engine = pair()
    a = engine([1], num_inference_steps=2, output_type="np").images
    b = engine([1], num_inference_steps=2, output_type="np", height=16, width=16).images
    assert np.array_equal(np.asarray(a), np.asarray(b))


def test_backends_that_cannot_run_say_why() -> None:
    model, _ = pair()
    config = pair()[1].config
    checkpoint = Checkpoint(config, model.state_dict(), "random")
    assert PixelFlowEngine.from_checkpoint(checkpoint, backend="auto").backend.name == "torch"
    for backend in ("triton", "flash"):
        with pytest.raises(BackendUnavailableError, match=f"'{backend}' cannot run: "):
            PixelFlowEngine.from_checkpoint(checkpoint, backend=backend)
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of"):
        PixelFlowEngine.from_checkpoint(checkpoint, backend="cuda")


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_not_returned(solver: str, value: float) -> None:
    """One class of a model whose weights went bad, in a batch with good ones: the stage and the images are named."""
    _, engine = pair()
    with torch.no_grad():
        engine.model.class_embedder.embedding_table.weight[3] = value
    request = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt", "solver": solver}
    with pytest.raises(FloatingPointError, match=r"stage 0: images \[1\] of the batch are not finite"):
        engine([2, 3, 1], **request)
    images = engine([2, 1], **request).images
    assert isinstance(images, torch.Tensor)
    assert images.isfinite().all()


def test_dopri5_gives_up_on_what_it_cannot_reach() -> None:
    """A field so steep that the steps the tolerance asks for are too many; the error says how far it came."""
    _, engine = pair()
    with torch.no_grad():
        engine.model.proj_out_2.weight.mul_(1e4)
    with pytest.raises(ConvergenceError, match=r"attempts did not reach tau = 1, the slowest image is at 0\.\d+"):
        engine([1], solver="dopri5", rtol=1e-9, atol=1e-12)

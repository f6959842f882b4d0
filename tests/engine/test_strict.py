"""Level A: the engine on ``backend="torch"`` in float32 equals the reference model and sampler in every bit."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelflow_engine import Checkpoint, ModelConfig, PixelFlowConfig, PixelFlowEngine, SchedulerConfig, reference
from pixelflow_engine import schedule as engine_schedule
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.reference import noise as reference_noise
from pixelflow_kernels import philox
from support.reference_models import normal, random_reference, seeded


class GivenNormals:
    """A reference noise source over the engine's counter-based normals, laid out by the reference's own code."""

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds

    def initial(self, shape: tuple[int, int, int, int]) -> Tensor:
        count = shape[1] * shape[2] * shape[3]
        z = philox.counter_normals(philox.seed_tensor(self.seeds), 0, -(-count // 4))
        return z.flatten(1)[:, :count].reshape(shape)

    def block(self, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        batch, channels, height, width = shape
        z = philox.counter_normals(philox.seed_tensor(self.seeds), stage, channels * height * width // 4)
        blocks = z.reshape(batch, channels, height // 2, width // 2, 4)
        return reference_noise.correlate(reference_noise.from_blocks(blocks))


def draw_case(seed: int) -> dict[str, Any]:
    """A random small configuration and request."""
    r = random.Random(seed)
    text = r.random() < 0.3
    shape: dict[str, Any] = {
        "heads": r.choice([1, 2, 3]),
        "head_dim": r.choice([4, 8, 20, 72]),
        "depth": r.choice([1, 2]),
        "patch_size": r.choice([1, 2, 4]),
        "num_classes": 0 if text else 7,
        "cross_attention_dim": 24 if text else None,
        "attention_bias": r.random() < 0.8,
        "channels": r.choice([1, 3]),
    }
    stages = r.choice([1, 2, 3, 4])
    side = shape["patch_size"] * 2 ** (stages - 1)
    solver = r.choice(["euler", "dopri5"])
    return {
        "shape": shape,
        "stages": stages,
        "height": side * r.choice([1, 2, 3]),
        "width": side * r.choice([1, 2, 3]),
        "batch": r.choice([1, 2, 3, 5, 7]),
        "steps": [r.randint(1, 3) for _ in range(stages)],
        "scale": r.choice([1.0, 1.5, 2.4, 0.0, -1.0]),
        "schedule": r.choice(["stagewise", "constant"]),
        "solver": solver,
        "error_norm": r.choice(["image", "batch"]),
        "noise": r.choice(["counter", "public"]),
        "shift": r.choice([1.0, 3.0]) if solver == "euler" else 1.0,
        "seeds": [r.randrange(2**64) for _ in range(7)],
    }


def build(case: dict[str, Any], seed: int) -> tuple[reference.PixelFlowTransformer, PixelFlowEngine]:
    """A random reference model, and an engine with its weights."""
    shape = case["shape"]
    model = random_reference(seed, dtype=torch.float32, **shape)
    config = PixelFlowConfig(
        model=ModelConfig(
            num_attention_heads=shape["heads"],
            attention_head_dim=shape["head_dim"],
            depth=shape["depth"],
            in_channels=shape["channels"],
            out_channels=shape["channels"],
            patch_size=shape["patch_size"],
            num_classes=shape["num_classes"],
            attention_bias=shape["attention_bias"],
            cross_attention_dim=shape["cross_attention_dim"],
        ),
        scheduler=SchedulerConfig(num_stages=case["stages"]),
        resolution=case["height"],
    )
    return model, PixelFlowEngine.from_checkpoint(Checkpoint(config, model.state_dict(), "random"))


def conditions(case: dict[str, Any], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same condition in the engine's and in the reference's words."""
    g, batch = seeded(seed), case["batch"]
    if case["shape"]["cross_attention_dim"] is None:
        labels = torch.randint(0, 8, (batch,), generator=g)
        return {"class_labels": labels}, {"class_labels": labels}
    states, null = normal((2, batch, 5, 24), g, torch.float32).unbind()
    mask, null_mask = (torch.rand((2, batch, 5), generator=g) < 0.7).long().unbind()
    return (
        {
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "null_encoder_hidden_states": null,
            "null_encoder_attention_mask": null_mask,
        },
        {"text": (states, mask), "null_text": (null, null_mask)},
    )


@pytest.mark.parametrize("seed", range(40))
def test_every_stage_and_image_has_the_references_bits(seed: int) -> None:
    case = draw_case(seed)
    model, engine = build(case, seed)
    engine_condition, reference_condition = conditions(case, seed)
    batch = case["batch"]
    tolerances = {"rtol": 1e-2, "atol": 1e-4, "error_norm": case["error_norm"]}
    counter = case["noise"] == "counter"
    ends: list[Tensor] = []
    out = engine(
        **engine_condition,
        num_inference_steps=case["steps"],
        guidance_scale=case["scale"],
        guidance_schedule=case["schedule"],
        solver=case["solver"],
        noise=case["noise"],
        shift=case["shift"],
        seed=case["seeds"][:batch] if counter else 11,
        height=case["height"],
        width=case["width"],
        output_type="np",
        callback_on_stage_end=lambda event: ends.append(event.latents),
        **tolerances,
    )
    torch.manual_seed(11)
    expected = reference.sample(
        model,
        shape=(batch, case["shape"]["channels"], case["height"], case["width"]),
        num_stages=case["stages"],
        num_inference_steps=case["steps"],
        guidance=reference.guidance_weights(case["scale"], case["stages"], case["schedule"]),
        noise=GivenNormals(case["seeds"][:batch]) if counter else reference.PublicNoise(),
        solver=case["solver"],
        shift=case["shift"],
        **reference_condition,
        **tolerances,
    )
    assert len(ends) == len(expected) == case["stages"]
    for stage, (got, want) in enumerate(zip(ends, expected, strict=True)):
        assert got.isfinite().all(), case
        assert got.dtype == want.dtype == torch.float32
        assert torch.equal(bits(got), bits(want)), (stage, case)
    assert np.array_equal(np.asarray(out.images), reference.to_images(expected[-1]).numpy())


def test_the_comparison_sees_one_changed_bit() -> None:
    case = draw_case(1)
    model, engine = build(case, 1)
    g = seeded(2)
    p, channels = case["shape"]["patch_size"], case["shape"]["channels"]
    x = normal((3, channels, 2 * p, 2 * p), g, torch.float32)
    labels = torch.tensor([0, 3, 7]) if case["shape"]["num_classes"] else None
    states = None if labels is not None else normal((3, 5, 24), g, torch.float32)
    times = torch.tensor([0.0, 500.25, 999.0])

    def engine_velocity() -> Tensor:
        return engine.velocity(x, times, class_labels=labels, encoder_hidden_states=states)

    expected = model(x, times, labels, encoder_hidden_states=states)
    assert torch.equal(bits(engine_velocity()), bits(expected))
    weight = engine.model.transformer_blocks[0].get_parameter("mlp.fc1.weight")
    largest = weight.abs().argmax()
    weight.data = weight.clone()  # the checkpoint's tensor belongs to the reference too
    weight.data.view(torch.int32).view(-1)[largest] ^= 1 << 12  # the last bit may be lost in the sums that follow
    assert not torch.equal(bits(engine_velocity()), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("solver", "state"), [("euler", "fp32"), ("euler", "public"), ("dopri5", "fp32")])
@pytest.mark.parametrize("seed", [4, 5, 9])
def test_other_types_agree_too(dtype: torch.dtype, solver: str, state: str, seed: int) -> None:
    case = draw_case(seed) | {"batch": 3, "noise": "counter"}
    model, engine = build(case, seed)
    model = model.to(dtype)
    engine = PixelFlowEngine.from_checkpoint(Checkpoint(engine.config, model.state_dict(), "random"), dtype=dtype)
    engine_condition, reference_condition = conditions(case, seed)
    tolerances = {"rtol": 1e-2, "atol": 1e-4}  # at the default a half-precision field is not smooth enough
    ends: list[Tensor] = []
    engine(
        **{k: v.to(dtype) if v.is_floating_point() else v for k, v in engine_condition.items()},
        num_inference_steps=case["steps"],
        guidance_schedule="stagewise",
        seed=case["seeds"][:3],
        solver=solver,  # type: ignore[arg-type]
        state=state,  # type: ignore[arg-type]
        **tolerances,
        height=case["height"],
        width=case["width"],
        output_type="pt",
        callback_on_stage_end=lambda event: ends.append(event.latents),
    )
    expected = reference.sample(
        model,
        shape=(3, case["shape"]["channels"], case["height"], case["width"]),
        num_stages=case["stages"],
        num_inference_steps=case["steps"],
        guidance=reference.guidance_weights(2.4, case["stages"]),
        noise=GivenNormals(case["seeds"][:3]),
        solver=solver,
        state=state,
        **tolerances,
        **{
            k: v if k == "class_labels" else tuple(t.to(dtype) if t.is_floating_point() else t for t in v)
            for k, v in reference_condition.items()
        },
    )
    for got, want in zip(ends, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert ends[-1].dtype == (dtype if state == "public" else torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.parametrize("num_train_timesteps", [1000, 10, 777])
def test_the_schedules_agree_in_every_bit(num_stages: int, num_train_timesteps: int) -> None:
    config = SchedulerConfig(num_stages=num_stages, num_train_timesteps=num_train_timesteps)
    ours = engine_schedule.make_stages(config)
    for stage, want in zip(ours, reference.make_stages(num_stages, num_train_timesteps), strict=True):
        assert (stage.index, stage.start, stage.end, stage.window) == (want.index, want.start, want.end, want.window)
        assert (stage.alpha, stage.beta) == (want.alpha, want.beta)
        assert np.array_equal(stage.model_times(config), want.model_times.numpy())
        assert np.array_equal(stage.local_times(config), want.local_times.numpy())
        for steps in (1, 2, 3, 10, 30, 99):
            for shift in (1.0, 3.0, 0.5):
                tau, t_model = engine_schedule.step_times(stage, config, steps, shift)
                want_tau, want_t = reference.euler_times(want, steps, shift)
                assert np.array_equal(tau, want_tau.numpy())
                assert np.array_equal(t_model[:-1], want_t.numpy())
                assert t_model[-1] == stage.window[1]


def test_the_packed_model_loads_the_published_names_strictly() -> None:
    model = random_reference(5)
    config = ModelConfig(num_attention_heads=2, attention_head_dim=8, depth=2, patch_size=2, num_classes=5)
    packed = PackedTransformer(config)
    assert list(packed.state_dict()) == list(model.state_dict())
    packed.load_state_dict(model.state_dict(), strict=True)


def bits(x: Tensor) -> Tensor:
    """The bit patterns, so that -0.0 differs from 0.0 and NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])

"""The reference sampler: what it asks of the model and of the noise, and whole cascades against numpy and scipy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pixelflow_engine.reference import euler_times, guidance_weights, make_stages, sample, to_images
from pixelflow_engine.reference.sampler import enter_stage
from support.numpy_model import NumpyModel
from support.reference_models import normal, random_reference, seeded

U32 = 2.0**-24
NULL = 7

# Four stages: boundaries 0, 1/4, 1/2, 3/4 and the published windows of model time.
ALPHA = [1 / (2 - b) for b in (0.0, 0.25, 0.5, 0.75)]
BETA = [3**0.5 * (1 - b) / (2 - b) for b in (0.0, 0.25, 0.5, 0.75)]
WINDOWS = [(0, 174.825), (175, 425.749), (426, 718.707), (719, 999)]


class FixedNoise:
    """The same normals whenever they are asked for, and a record of what was asked."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def draw(self, stage: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + stage))

    def initial(self, shape: tuple[int, int, int, int]) -> Tensor:
        self.asked.append((0, shape))
        return self.draw(0, shape)

    def block(self, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        self.asked.append((stage, shape))
        return self.draw(stage, shape)


@dataclasses.dataclass
class Call:
    """What the model was called with."""

    x: Tensor
    t_model: Tensor
    labels: Tensor | None
    states: Tensor | None
    mask: Tensor | None


class RecordingModel:
    """A velocity that depends on the label and on the time, in place of a transformer."""

    num_classes = NULL

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.proj_out_2 = torch.nn.Linear(1, 1, dtype=dtype)  # whose type is the model's
        self.dtype = dtype
        self.calls: list[Call] = []

    def __call__(
        self,
        x: Tensor,
        t_model: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append(Call(x, t_model, class_labels, encoder_hidden_states, encoder_attention_mask))
        level = class_labels if class_labels is not None else encoder_hidden_states[:, 0, 0]
        return velocity(x, t_model[:, None, None, None], level[:, None, None, None], torch.cos).to(self.dtype)


def velocity(x: Any, t_model: Any, label: Any, cos: Callable[[Any], Any]) -> Any:
    """``(0.2 + 0.1 label) cos(t/200) x - 0.3``."""
    return (0.2 + 0.1 * label) * cos(t_model / 200) * x - 0.3


def numpy_cascade(
    labels: np.ndarray, side: int, steps: list[int], weights: list[float], noise: FixedNoise, shift: float
) -> list[np.ndarray]:
    """Euler through four stages, from the equations, in float64."""
    shape = (len(labels), 3, side // 8, side // 8)
    x, ends = noise.draw(0, shape).double().numpy(), []
    label = labels[:, None, None, None]
    for s in range(4):
        if s > 0:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
            x = ALPHA[s] * x + BETA[s] * noise.draw(s, x.shape).double().numpy()
        tau = np.linspace(0, 0.999, steps[s])
        tau = tau / (shift + (1 - shift) * tau)
        first, last = WINDOWS[s]
        for now, then in zip(tau, [*tau[1:], 1.0], strict=True):
            t = first + (last - first) * now / 0.999
            null, conditional = velocity(x, t, NULL, np.cos), velocity(x, t, label, np.cos)
            x = x + (then - now) * (null + weights[s] * (conditional - null))
        ends.append(x)
    return ends


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("weights", [guidance_weights(2.4, 4), [1.5] * 4, [1.0] * 4], ids=str)
def test_a_whole_cascade_by_euler(weights: list[float], shift: float) -> None:
    steps, labels, noise = [3, 1, 5, 2], torch.tensor([0, 3, 6]), FixedNoise(100)
    print("seed 100")
    arguments = {"num_stages": 4, "num_inference_steps": steps, "guidance": weights, "shift": shift}
    ends = sample(RecordingModel(), shape=(3, 3, 32, 32), noise=noise, class_labels=labels, **arguments)
    expected = numpy_cascade(labels.numpy(), 32, steps, weights, noise, shift)
    assert [tuple(x.shape) for x in ends] == [(3, 3, side, side) for side in (4, 8, 16, 32)]
    for x, y in zip(ends, expected, strict=True):
        assert x.dtype == torch.float32
        # 11 steps and 3 entries, some ten roundings each of values below 6, stretched by e at most.
        assert np.abs(x.double().numpy() - y).max() <= 140 * 6 * np.e * U32


def test_noise_is_asked_for_once_a_stage_in_order() -> None:
    noise = FixedNoise(200)
    arguments = {"num_stages": 3, "num_inference_steps": [1] * 3, "guidance": [1.0] * 3}
    sample(RecordingModel(), shape=(2, 3, 16, 24), noise=noise, class_labels=torch.tensor([1, 2]), **arguments)
    assert noise.asked == [(0, (2, 3, 4, 6)), (1, (2, 3, 8, 12)), (2, (2, 3, 16, 24))]


def test_no_null_half_where_the_weight_is_one() -> None:
    model, labels, steps = RecordingModel(), torch.tensor([4, 0, 2]), [2, 3, 1, 4]
    arguments = {"num_stages": 4, "num_inference_steps": steps, "guidance": guidance_weights(2.4, 4)}
    sample(model, shape=(3, 3, 16, 16), noise=FixedNoise(300), class_labels=labels, **arguments)
    assert [len(call.x) for call in model.calls] == [3] * 2 + [6] * 8
    assert all(torch.equal(call.labels, labels) for call in model.calls[:2])
    for call in model.calls[2:]:
        assert call.labels.tolist() == [NULL] * 3 + [4, 0, 2]  # the null half first
        assert torch.equal(call.x[:3], call.x[3:])
        assert torch.equal(call.t_model[:3], call.t_model[3:])
    model = RecordingModel()
    arguments["guidance"] = [1.0] * 4
    sample(model, shape=(3, 3, 16, 16), noise=FixedNoise(300), class_labels=labels, **arguments)
    assert [len(call.x) for call in model.calls] == [3] * 10


def test_model_times_are_those_of_the_euler_grid() -> None:
    model, steps = RecordingModel(), [2, 5, 1, 3]
    arguments = {"num_stages": 4, "num_inference_steps": steps, "guidance": [1.5] * 4, "shift": 2.0}
    sample(model, shape=(2, 3, 16, 16), noise=FixedNoise(400), class_labels=torch.tensor([1, 2]), **arguments)
    expected = torch.cat([euler_times(stage, n, 2.0)[1] for stage, n in zip(make_stages(4), steps, strict=True)])
    assert all(call.t_model.dtype == torch.float32 and call.t_model.shape == (4,) for call in model.calls)
    assert torch.equal(torch.stack([call.t_model[0] for call in model.calls]), expected.float())
    assert all((call.t_model == call.t_model[0]).all() for call in model.calls)


def test_text_states_and_masks_come_null_first() -> None:
    model, generator = RecordingModel(), seeded(5)
    text = normal((2, 6, 4), generator, torch.float32), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    null = normal((2, 6, 4), generator, torch.float32), torch.tensor([[1, 0, 0, 0, 0, 0]] * 2)
    arguments = {"num_stages": 2, "num_inference_steps": [1, 2], "text": text, "null_text": null}
    sample(model, shape=(2, 3, 8, 8), noise=FixedNoise(500), guidance=[1.0, 4.0], **arguments)
    first, *others = model.calls
    assert torch.equal(first.states, text[0])
    assert torch.equal(first.mask, text[1])
    assert len(others) == 2
    for call in others:
        assert call.labels is None
        assert torch.equal(call.states, torch.cat([null[0], text[0]]))
        assert torch.equal(call.mask, torch.cat([null[1], text[1]]))


def test_guidance_extrapolates_from_null_to_condition() -> None:
    """Of velocities 1 (null) and 3 (conditional) weight w makes ``1 + 2 w``."""

    class TwoLevels(RecordingModel):
        def __call__(self, x: Tensor, t_model: Tensor, class_labels: Tensor | None = None, **others: object) -> Tensor:
            return torch.where(class_labels == NULL, 1.0, 3.0)[:, None, None, None].expand_as(x)

    for weight in (0.0, 0.5, 1.0, 2.5):
        noise = FixedNoise(600)
        arguments = {"num_stages": 1, "num_inference_steps": [1], "guidance": [weight]}
        (x,) = sample(TwoLevels(), shape=(2, 3, 4, 4), noise=noise, class_labels=torch.tensor([0, 5]), **arguments)
        assert (x - (noise.draw(0, (2, 3, 4, 4)) + 1 + 2 * weight)).abs().max() <= 8 * 2 * U32


@pytest.mark.parametrize("index", [1, 2, 3])
def test_entering_a_stage(index: int) -> None:
    x, noise = normal((2, 3, 4, 6), seeded(7), torch.float32), FixedNoise(700)
    entered = enter_stage(x, make_stages(4)[index], noise)
    assert entered.dtype == torch.float32
    assert entered.shape == (2, 3, 8, 12)
    up = x.double().numpy().repeat(2, axis=2).repeat(2, axis=3)
    expected = ALPHA[index] * up + BETA[index] * noise.draw(index, (2, 3, 8, 12)).double().numpy()
    assert np.abs(entered.double().numpy() - expected).max() <= 5 * 8 * U32


def test_an_fp32_state_keeps_what_a_bf16_velocity_gives() -> None:
    """Steps of a constant velocity add up to it: 30 of them lose 1e-6 in float32, and 1e-2 in bfloat16."""

    class Constant(RecordingModel):
        def __call__(self, x: Tensor, t_model: Tensor, class_labels: Tensor | None = None, **others: object) -> Tensor:
            self.calls.append(Call(x, t_model, class_labels, None, None))
            return torch.full_like(x, 1.25, dtype=torch.bfloat16)

    arguments = {"num_stages": 1, "num_inference_steps": [30], "guidance": [1.0], "class_labels": torch.tensor([1])}
    noise, model = FixedNoise(800), Constant(torch.bfloat16)
    (x,) = sample(model, shape=(1, 3, 4, 4), noise=noise, **arguments)
    expected = noise.draw(0, (1, 3, 4, 4)) + 1.25
    assert x.dtype == torch.float32
    assert all(call.x.dtype == torch.float32 for call in model.calls)
    error = (x - expected).abs().max().item()
    # A product of at most 1.25 / 29 and a sum below 5, 30 times; step lengths round to 2u of a time.
    assert error <= 30 * (5 + 2 * 1.25) * U32, f"differs by {error:.1e}"

    model = Constant(torch.bfloat16)
    (x,) = sample(model, shape=(1, 3, 4, 4), noise=noise, state="public", **arguments)
    assert x.dtype == torch.bfloat16
    assert [call.x.dtype for call in model.calls] == [torch.float32] + [torch.bfloat16] * 29
    assert (x.float() - expected).abs().max() > 2e-3, "a bfloat16 state is coarser than this"


def test_the_public_state_stays_bfloat16_through_the_cascade() -> None:
    model = RecordingModel(torch.bfloat16)
    arguments = {"num_stages": 3, "num_inference_steps": [2, 1, 2], "guidance": [1.0, 1.5, 2.0]}
    ends = sample(
        model,
        shape=(2, 3, 16, 16),
        noise=FixedNoise(900),
        class_labels=torch.tensor([1, 2]),
        state="public",
        **arguments,
    )
    assert [x.dtype for x in ends] == [torch.bfloat16] * 3
    assert [call.x.dtype for call in model.calls] == [torch.float32] + [torch.bfloat16] * 4
    # Of a float32 model the two states are the same, bit for bit.
    pair = [
        sample(
            RecordingModel(),
            shape=(2, 3, 16, 16),
            noise=FixedNoise(900),
            class_labels=torch.tensor([1, 2]),
            state=state,
            **arguments,
        )
        for state in ("fp32", "public")
    ]
    assert all(torch.equal(x, y) for x, y in zip(*pair, strict=True))


def test_the_public_state_under_autocast() -> None:
    """Float32 weights under bf16 autocast: the velocity is bf16, and the public state from the first step on."""
    model = random_reference(13, num_classes=NULL, dtype=torch.float32)
    seen = []
    model.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    arguments = {"num_stages": 2, "num_inference_steps": [2, 2], "guidance": [1.0, 2.4]}
    for state, expected in (("public", torch.bfloat16), ("fp32", torch.float32)):
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ends = sample(
                model,
                shape=(2, 3, 8, 8),
                noise=FixedNoise(950),
                class_labels=torch.tensor([1, 2]),
                state=state,
                **arguments,
            )
        assert seen == [torch.float32] + [expected] * 3, state
        assert [x.dtype for x in ends] == [expected] * 2, state


@pytest.mark.parametrize("error_norm", ["image", "batch"])
def test_a_whole_cascade_by_dopri5(error_norm: str) -> None:
    """Each stage is integrated over tau in [0, 1] while model time crosses the window; scipy's DOP853 is the truth."""
    model, labels, noise, weights = RecordingModel(), torch.tensor([0, 6]), FixedNoise(1000), guidance_weights(2.4, 4)
    arguments = {"solver": "dopri5", "error_norm": error_norm, "rtol": 1e-4, "atol": 1e-7}
    ends = sample(
        model,
        shape=(2, 3, 16, 16),
        num_stages=4,
        num_inference_steps=[0] * 4,
        guidance=weights,
        noise=noise,
        class_labels=labels,
        **arguments,
    )
    x, label = noise.draw(0, (2, 3, 2, 2)).double().numpy(), labels.numpy()[:, None, None, None]
    for s, ((first, last), end) in enumerate(zip(WINDOWS, ends, strict=True)):
        if s > 0:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
            x = ALPHA[s] * x + BETA[s] * noise.draw(s, x.shape).double().numpy()

        def field(tau: float, flat: np.ndarray, s: int = s, first: float = first, last: float = last) -> np.ndarray:
            y, t = flat.reshape(2, 3, *[2 << s] * 2), first + (last - first) * tau
            null, conditional = velocity(y, t, NULL, np.cos), velocity(y, t, label, np.cos)
            return (null + weights[s] * (conditional - null)).ravel()

        x = solve_ivp(field, (0, 1), x.ravel(), "DOP853", rtol=1e-11, atol=1e-11).y[:, -1].reshape(x.shape)
        assert end.dtype == torch.float32
        # At most ten steps a stage, each good to 1e-4 of a value below 8 in its root mean square, over four stages.
        assert np.sqrt(((end.double().numpy() - x) ** 2).mean()) <= 4 * 10 * 8e-4 / 4
    by_side = {side: [call for call in model.calls if call.x.shape[-1] == side] for side in (2, 4, 8, 16)}
    for (first, last), calls, images in zip(WINDOWS, by_side.values(), (2, 4, 4, 4), strict=True):
        assert all(len(call.x) == images for call in calls)
        assert all(call.x.dtype == call.t_model.dtype == torch.float32 for call in calls)
        times = torch.stack([call.t_model for call in calls]).double()
        assert (times[0] - first).abs().max() <= 1000 * U32
        assert (times[-1] - last).abs().max() <= 1000 * U32  # it lands, and never looks beyond the window
        assert times.max() <= last + 1000 * U32


def test_per_image_dopri5_is_the_default() -> None:
    def run(labels: list[int], **options: str) -> Tensor:
        class First(FixedNoise):
            def draw(self, stage: int, shape: tuple[int, ...]) -> Tensor:
                return super().draw(stage, (2, *shape[1:]))[: shape[0]]

        arguments = {"num_stages": 2, "num_inference_steps": [0, 0], "guidance": [1.0, 1.0], "solver": "dopri5"}
        arguments |= {"shape": (len(labels), 3, 8, 8), "class_labels": torch.tensor(labels)}
        return sample(RecordingModel(), noise=First(1100), **arguments, **options)[-1][0]

    assert torch.equal(run([1, 0]), run([1, 6]))
    assert torch.equal(run([1, 0]), run([1, 6], error_norm="image"))
    assert not torch.equal(run([1, 0], error_norm="batch"), run([1, 6], error_norm="batch"))


def test_a_real_model_through_a_whole_cascade() -> None:
    """The reference model in float64 under the reference sampler, against the numpy model under a numpy sampler."""
    model = random_reference(12, num_classes=NULL, patch_size=1)
    model.proj_out_2.weight.mul_(0.3)
    twin = NumpyModel({name: value.numpy() for name, value in model.state_dict().items()}, heads=2)
    labels, weights, steps, noise = [2, 5], guidance_weights(2.4, 4), [2, 1, 2, 1], FixedNoise(1200)
    ends = sample(
        model,
        shape=(2, 3, 16, 16),
        num_stages=4,
        num_inference_steps=steps,
        guidance=weights,
        noise=noise,
        class_labels=torch.tensor(labels),
    )
    x = noise.draw(0, (2, 3, 2, 2)).double().numpy()
    for s, end in enumerate(ends):
        if s > 0:
            x = x.repeat(2, axis=2).repeat(2, axis=3)
            x = ALPHA[s] * x + BETA[s] * noise.draw(s, x.shape).double().numpy()
        tau = np.linspace(0, 0.999, steps[s])
        for now, then in zip(tau, [*tau[1:], 1.0], strict=True):
            t = float(np.float32(WINDOWS[s][0] + (WINDOWS[s][1] - WINDOWS[s][0]) * now / 0.999))
            null, conditional = (
                np.stack([twin(image, t, label) for image, label in zip(x, batch, strict=True)])
                for batch in ([NULL] * 2, labels)
            )
            x = x + (then - now) * (null + weights[s] * (conditional - null))
        # The state is rounded to float32 before every step, 6 steps and 3 entries of values below 8; the random model
        # stretches a difference by ten or so on the way.
        assert np.abs(end.double().numpy() - x).max() <= 9 * 8 * 10 * U32


def test_images_are_in_the_unit_range_and_channels_last() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5, 9.0]).reshape(1, 2, 2, 2)
    images = to_images(x)
    assert images.dtype == torch.float32
    assert images.shape == (1, 2, 2, 2)
    assert images[0, :, :, 0].flatten().tolist() == [0, 0, 0.25, 0.5]
    assert images[0, :, :, 1].flatten().tolist() == [0.625, 1, 1, 1]
    assert to_images(torch.zeros(2, 3, 4, 6)).shape == (2, 4, 6, 3)
    assert to_images(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32

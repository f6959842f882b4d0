"""What a call can do besides sampling to its end, on both engines: streams, steps' callbacks, images to begin from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request, StageEvent, StepEvent
from pixelflow_engine.calls import Call, PlannedCall
from pixelflow_engine.noise import CounterNoise
from pixelflow_engine.output import from_images
from pixelflow_engine.reference import euler_times, make_stages
from pixelflow_engine.solvers import two_step_lengths
from pixelflow_engine.tableaus import AB2
from support.cascades import CPU, U32, checkpoint_of, exact_engine, fixed_steps, packed_engine
from support.reference_models import normal, random_reference, seeded

Build = Callable[..., PixelFlowEngine]
F32 = torch.float32
ENGINES: dict[str, Build] = {"exact": exact_engine, "packed": packed_engine}
by_engine = pytest.mark.parametrize("build", ENGINES.values(), ids=ENGINES)
REQUEST: dict[str, Any] = {"num_inference_steps": [2, 3, 4], "output_type": "pt", "seed": [5, 6]}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> PixelFlowEngine:
    """Three stages, 16 pixels, five classes."""
    return ENGINES[request.param](checkpoint_of(random_reference(50, depth=1), 3, 16))


def shown(latents: Any) -> Tensor:
    """A state as an image in [0, 1]."""
    return (latents / 2 + 0.5).clamp(0, 1)


# --- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
def test_a_stream_yields_what_the_call_makes(engine: PixelFlowEngine, solver: str) -> None:
    options = {**REQUEST, "solver": solver, "rtol": 1e-2}
    ends: list[StageEvent] = []
    out = engine([1, 2], callback_on_stage_end=ends.append, **options)
    events = list(engine.stream([1, 2], **options))
    assert len(events) == len(ends) == 3
    for event, end, report in zip(events, ends, out.stages, strict=True):
        assert torch.equal(event.latents, end.latents)
        for name in ("stage", "height", "width", "tokens", "guidance_weight", "steps", "evaluations"):
            assert getattr(event.report, name) == getattr(report, name)
        assert torch.equal(event.images("pt"), shown(event.latents))
    assert torch.equal(events[-1].images("pt"), out.images)
    assert [image.size for image in events[0].images()] == [(4, 4)] * 2


def test_a_stream_says_what_became_of_its_images(engine: PixelFlowEngine) -> None:
    """Of each stage, as the call does in the end, with the seeds that draw the images again."""
    with torch.no_grad():
        engine.model.class_embedder.embedding_table.weight[4].fill_(torch.nan)  # type: ignore[union-attr]
    options = REQUEST | {"seed": None, "on_failure": "report"}
    events = list(engine.stream([1, 4, 2], **options))
    assert [event.statuses for event in events] == [("ok", "nonfinite", "ok")] * 3
    assert [event.seeds for event in events] == [events[0].seeds] * 3
    told: list[StageEvent] = []
    again = engine([1, 4, 2], **options | {"seed": events[0].seeds}, callback_on_stage_end=told.append)
    assert again.statuses == events[-1].statuses
    assert again.seeds == events[-1].seeds
    assert [(event.statuses, event.seeds) for event in told] == [(e.statuses, e.seeds) for e in events]
    assert torch.equal(events[-1].images("pt")[0], again.images[0])


def test_a_failed_image_is_black_where_it_is_no_number(engine: PixelFlowEngine) -> None:
    """And no warning says that pixels are undefined."""
    with torch.no_grad():
        engine.model.class_embedder.embedding_table.weight[4].fill_(torch.nan)  # type: ignore[union-attr]
    failed, other = engine([4, 2], **REQUEST | {"output_type": "pil"}, on_failure="report").images
    assert failed.getextrema() == ((0, 0),) * 3
    assert other.getextrema() != ((0, 0),) * 3


def test_an_event_has_no_other_form_of_images(engine: PixelFlowEngine) -> None:
    event = next(engine.stream([1, 2], **REQUEST))
    with pytest.raises(ValueError, match=r"^output_type: got 'png', expected one of pil, np, pt$"):
        event.images("png")  # type: ignore[arg-type]


def test_hooks_on_a_block_see_it_and_change_no_bit(engine: PixelFlowEngine) -> None:
    """Others run in halves, which are no call."""
    expected = engine([1, 2], **REQUEST)
    seen: list[tuple[int, ...]] = []
    block = engine.model.blocks[0]
    handle = block.register_forward_hook(lambda module, given, out: seen.append(tuple(out[0].shape)))
    found = engine([1, 2], **REQUEST)
    handle.remove()
    assert torch.equal(found.images, expected.images)
    assert len(seen) == sum(stage.evaluations for stage in found.stages)
    assert all(shape[1] == engine.model.config.width for shape in seen)


def test_a_stream_stops_where_its_reader_stops(engine: PixelFlowEngine) -> None:
    seen: list[int] = []
    stream = engine.stream([1, 2], callback_on_step_end=lambda e: seen.append(e.stage), **REQUEST)
    assert seen == [], "something ran before it was asked for"
    assert next(stream).report.stage == 0
    assert seen == [0, 0]
    assert torch.is_grad_enabled()
    next(stream)
    stream.close()
    assert seen == [0, 0, 1, 1, 1]


def test_a_stream_refuses_before_anything_runs(engine: PixelFlowEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CounterNoise, "initial", lambda *_: pytest.fail("noise was drawn"))
    with pytest.raises(ValueError, match=r"class_labels\[0\]: got 9, expected an integer from 0 to 5"):
        engine.stream([9])
    with pytest.raises(ValueError, match="solver: got 'rk4', expected one of"):
        engine.stream([1], solver="rk4")
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        engine.stream([1], step=3)


# --- callbacks that change the state -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_masked_pixels_stay_where_a_callback_puts_them(engine: PixelFlowEngine, solver: str) -> None:
    """Inpainting: after every step half of the image is put back; the model sees it, and the end shows it."""
    known = normal((2, 3, 16, 16), seeded(51), torch.float32).tanh()

    def kept(event: StepEvent) -> Tensor:
        now = event.latents.clone()
        half = now.shape[-1] // 2
        now[..., :half] = F.avg_pool2d(known, 16 // now.shape[-1])[..., :half]
        return now

    options = {**REQUEST, "solver": solver}
    images = engine([1, 2], callback_on_step_end=kept, **options).images
    assert torch.equal(images[..., :8], shown(known)[..., :8])
    free = engine([1, 2], **options).images
    assert (images[..., 8:] - free[..., 8:]).abs().max() > 1e-2, "the model did not see what was put back"
    same = engine([1, 2], callback_on_step_end=lambda event: event.latents.clone(), **options).images
    assert torch.equal(same, free)


def test_a_callback_may_return_images_of_several_sizes() -> None:
    engine = packed_engine(checkpoint_of(random_reference(52, depth=1), 2, 8))
    weights = [(8, 1.0), (16, 3.0), (8, 2.0)]  # sorted by size and guidance, and back
    requests = [Request(class_label=i, seed=i, width=w, guidance_scale=s) for i, (w, s) in enumerate(weights)]

    def numbered(event: StepEvent) -> list[Tensor]:
        assert isinstance(event.latents, list)
        return [torch.full_like(x, 0.25 * (i + 1)) for i, x in enumerate(event.latents)]

    out = engine(requests, num_inference_steps=2, output_type="pt", callback_on_step_end=numbered)
    for i, image in enumerate(out.images):
        assert image.shape == (3, 8, requests[i].width)
        assert (image == 0.5 + 0.125 * (i + 1)).all()


@pytest.mark.parametrize("solver", ["ab2", "dopri5"])
def test_solvers_that_remember_refuse_other_states(engine: PixelFlowEngine, solver: str) -> None:
    with pytest.raises(ValueError, match=f"callback_on_step_end: got new latents from it with solver='{solver}'"):
        engine([1, 2], callback_on_step_end=lambda event: event.latents, solver=solver, **REQUEST)
    engine([1, 2], callback_on_step_end=lambda event: None, solver=solver, **REQUEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], "got 1 images, expected 2"),
        (lambda x: torch.cat([x, x]), "got 4 images, expected 2"),
        (lambda x: x[..., :-1], r"got images \[\(3, 4, 3\), \(3, 4, 3\)\], expected 2 of \(3, 4, 4\)"),
        (lambda x: x[:, :1], r"got images \[\(1, 4, 4\)"),
        (lambda x: [x[0], x[1, :, :2]], r"got images \[\(3, 4, 4\), \(3, 2, 4\)\]"),
        (lambda x: x.numpy(), "got ndarray, expected a tensor or a list of tensors"),
        (lambda x: [1, 2], "got list, expected a tensor or a list of tensors"),
        (lambda x: 0.5, "got float, expected a tensor"),
        (lambda x: x.sum(), "got a tensor without dimensions, expected images"),
    ],
)
def test_states_of_another_shape_are_refused(
    engine: PixelFlowEngine, change: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^callback_on_step_end: {message}"):
        engine([1, 2], callback_on_step_end=lambda event: change(event.latents), **REQUEST)


# --- images to begin from ----------------------------------------------------------------------------------


def begun(image: Tensor, seeds: list[int], stage: int, tau: float) -> Tensor:
    """The state of training: the line from a noisy smaller image, enlarged, to this one, in float64."""
    here = image.double().flatten(0, 0)
    side = here.shape[-1] // 2 ** (2 - stage)
    small = F.interpolate(here, size=(here.shape[-2] // 2 ** (2 - stage), side), mode="area")
    before = F.interpolate(F.interpolate(small, scale_factor=0.5, mode="area"), scale_factor=2, mode="nearest")
    span = make_stages(3)[stage]
    eps = CounterNoise(tuple(seeds), CPU).initial((len(seeds), *small.shape[1:])).double()
    end = span.end * small + (1 - span.end) * eps
    start = span.start * before + (1 - span.start) * eps
    return tau * end + (1 - tau) * start


BEGINNINGS = [
    (stage, strength, kept)
    for stage in (0, 1, 2)
    for strength, kept in [(1.0, 4), (0.5, 2), (0.63, 3), (0.61, 2), (0.01, 1), (torch.tensor(0.75), 3)]
    if stage > 0 or kept < 4
]


@pytest.mark.parametrize(("stage", "strength", "kept"), BEGINNINGS)
@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_an_image_is_taken_up_as_training_shows_it(
    engine: PixelFlowEngine, stage: int, strength: Any, kept: int, solver: str
) -> None:
    """With a velocity of zero the first stage ends as it began; its steps are a share of all of them."""
    with torch.no_grad():
        for part in (engine.model.proj_out_2.weight, engine.model.proj_out_2.bias):
            part.zero_()
    image = torch.rand((2, 3, 16, 16), generator=seeded(53))
    steps: list[tuple[int, int, float]] = []
    ends: list[Tensor] = []
    out = engine(
        [1, 2],
        num_inference_steps=4,
        shift=2.0,
        solver=solver,
        seed=[5, 6],
        image=image,
        start_stage=stage,
        strength=strength,
        callback_on_step_end=lambda e: steps.append((e.stage, e.step, e.tau)),
        callback_on_stage_end=lambda e: ends.append(e.latents),
    )
    tau = euler_times(make_stages(3)[stage], 4, 2.0)[0]
    assert [s.stage for s in out.stages] == list(range(stage, 3))
    assert [s.steps for s in out.stages] == [kept] + [4] * (2 - stage)
    assert [s.evaluations for s in out.stages] == [s.steps + (solver == "ab2") for s in out.stages]
    assert [step for at, step, _ in steps if at == stage] == list(range(4 - kept, 4))
    assert [t for at, _, t in steps if at == stage] == tau[4 - kept + 1 :].tolist()
    expected = begun(2 * image - 1, [5, 6], stage, tau[4 - kept].item())
    assert ends[0].shape == expected.shape
    assert (ends[0] - expected).abs().max() <= 16 * 6 * U32


@by_engine
@pytest.mark.parametrize("size", [6, 2])
def test_a_first_stage_that_cannot_be_halved_takes_an_image_up(build: Build, size: int) -> None:
    """Three pixels, or one."""
    engine = build(checkpoint_of(random_reference(59, depth=1, patch_size=1), 2, 16))
    image = torch.rand((2, 3, size, size), generator=seeded(60))
    options = {"num_inference_steps": 2, "output_type": "pt", "seed": [5, 6], "height": size, "width": size}
    whole, part = engine([1, 2], **options), engine([1, 2], image=image, strength=0.5, **options)
    assert not torch.equal(part.images, whole.images)


def test_the_steps_that_are_left_are_done(engine: PixelFlowEngine) -> None:
    """The last two of four steps of the last stage, by hand, with the engine's own velocity."""
    image = torch.rand((2, 3, 16, 16), generator=seeded(54))
    stage = make_stages(3)[2]
    tau, t_model = euler_times(stage, 4)
    times = [*t_model.tolist(), stage.window[1]][2:]
    out: list[Tensor] = []
    options = {"seed": [5, 6], "image": image, "start_stage": 2, "strength": 0.5, "guidance_scale": 1.0}
    for solver in ("euler", "heun", "ab2"):
        engine(
            [1, 2],
            num_inference_steps=4,
            solver=solver,
            callback_on_stage_end=lambda e: out.append(e.latents),
            **options,
        )
        x = begun(2 * image - 1, [5, 6], 2, tau[2].item()).float()
        x = fixed_steps(lambda y, i: engine.velocity(y, times[i], class_labels=[1, 2]), x, tau[2:].tolist(), solver)
        assert (out[-1] - x).abs().max() < 1e-4


def test_strength_one_takes_dopri5_through_the_whole_stage(engine: PixelFlowEngine) -> None:
    image = torch.rand((1, 3, 16, 16), generator=seeded(55))
    out = engine([1, 2], solver="dopri5", image=image, start_stage=2, rtol=1e-1, output_type="pt")
    assert [s.stage for s in out.stages] == [2]
    assert (out.images[0] - out.images[1]).abs().max() > 1e-2


def test_images_come_in_every_form_that_calls_return(engine: PixelFlowEngine) -> None:
    """Of eight bits, so that all forms can hold it; one image serves all, or each its own."""
    bits = torch.randint(0, 256, (2, 3, 16, 16), generator=seeded(56), dtype=torch.uint8)
    tensor = bits.float() / 255
    array = np.ascontiguousarray(tensor.permute(0, 2, 3, 1).numpy())
    pictures = [Image.fromarray(pixels) for pixels in bits.permute(0, 2, 3, 1).numpy()]
    options = {**REQUEST, "start_stage": 1, "strength": 0.5}
    expected = engine([1, 2], image=tensor, **options).images
    for image in (array, array.astype(np.float64), pictures, tuple(pictures), tensor.double()):
        assert torch.equal(engine([1, 2], image=image, **options).images, expected)
    first = engine([1, 2], image=tensor[:1], **options).images
    assert torch.equal(engine([1, 2], image=pictures[0], **options).images, first)
    assert torch.equal(first, engine([1, 2], image=tensor[[0, 0]], **options).images)
    assert not torch.equal(first[1], expected[1])


def test_a_grey_picture_of_16_bits_keeps_them(engine: PixelFlowEngine) -> None:
    """In either byte order; it has one channel and serves three."""
    bits = torch.randint(0, 65536, (16, 16), generator=seeded(58), dtype=torch.int32)
    samples = bits.numpy().astype(np.uint16)
    options = {**REQUEST, "start_stage": 2, "strength": 0.25}
    expected = engine([1, 2], image=(bits.float() / 65535).expand(1, 3, 16, 16), **options).images
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        picture = Image.frombytes(mode, (16, 16), samples.astype(order).tobytes())
        assert torch.equal(engine([1, 2], image=picture, **options).images, expected)


@pytest.mark.parametrize("mode", ["I", "F", "LAB", "La"])
def test_a_picture_without_a_known_white_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=rf"^image: got a PIL image of mode {mode}\b"):
        from_images(Image.new(mode, (16, 16)), channels=1)


GREY = Image.fromarray(np.zeros((16, 16), dtype=np.uint8))
IMAGE = torch.zeros(1, 3, 16, 16)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stage below": ({"image": IMAGE, "start_stage": -1}, "start_stage: got -1, expected an integer from 0 to 2"),
    "stage above": ({"image": IMAGE, "start_stage": 3}, "start_stage: got 3"),
    "half a stage": ({"image": IMAGE, "start_stage": 1.5}, "start_stage: got 1.5"),
    "truth": ({"image": IMAGE, "start_stage": True}, "start_stage: got True"),
    "no strength": ({"image": IMAGE, "strength": 0.0}, "strength: got 0.0, expected a number above 0, at most 1"),
    "too strong": ({"image": IMAGE, "strength": 1.01}, "strength: got 1.01"),
    "nan": ({"image": IMAGE, "strength": float("nan")}, "strength: got nan"),
    "words": ({"image": IMAGE, "strength": "all"}, "strength: got 'all'"),
    "nothing of it": ({"image": IMAGE}, "strength: got 1.0 with start_stage=0, .* expected less, or a later stage$"),
    "rounded to all": ({"image": IMAGE, "strength": 0.96}, "strength: got 0.96 with start_stage=0, .* expected less"),
    "of one step": (
        {"image": IMAGE, "strength": 0.3, "num_inference_steps": 1},
        "strength: got 0.3 with start_stage=0, .* expected a later stage$",
    ),
    "nothing in dopri5": (
        {"image": IMAGE, "solver": "dopri5"},
        "strength: got 1.0 with start_stage=0, .* expected a later stage$",
    ),
    "stage alone": ({"start_stage": 1}, "image: got None with start_stage=1 and strength=1"),
    "strength alone": ({"strength": 0.5}, "image: got None with start_stage=0 and strength=0.5"),
    "dopri5": ({"image": IMAGE, "strength": 0.5, "solver": "dopri5"}, "strength: got 0.5 with solver='dopri5'"),
    "public noise": ({"image": IMAGE, "noise": "public", "seed": 1}, "noise: got 'public', expected 'counter'"),
    "size": ({"image": torch.zeros(1, 3, 16, 8)}, "image: got 16 x 8 pixels, expected 16 x 16"),
    "width": ({"image": IMAGE, "width": 32}, "image: got 16 x 16 pixels, expected 16 x 32"),
    "many": ({"image": IMAGE.expand(3, -1, -1, -1)}, "image: got 3, expected 1 or 2, one per image"),
    "none": ({"image": IMAGE[:0]}, "image: got 0"),
    "channels": ({"image": torch.zeros(1, 1, 16, 16)}, r"image: got a tensor \(1, 1, 16, 16\), expected PIL images"),
    "flat": ({"image": IMAGE[0]}, r"image: got a tensor \(3, 16, 16\)"),
    "flat array": ({"image": np.zeros((16, 16, 3), np.float32)}, r"image: got an array of shape \(16, 16, 3\)"),
    "channels first": ({"image": np.zeros((1, 3, 16, 16), np.float32)}, r"image: got a tensor \(1, 16, 3, 16\)"),
    "below 0": ({"image": IMAGE - 0.01}, r"image: got values outside of \[0, 1\]"),
    "above 1": ({"image": IMAGE + 1.01}, "image: got values outside"),
    "not finite": ({"image": IMAGE * float("nan")}, "image: got values outside"),
    "bytes": (
        {"image": np.zeros((1, 16, 16, 3), np.uint8)},
        "image: got torch.uint8, expected numbers of a floating type",
    ),
    "a word": ({"image": "cat.png"}, "image: got str, expected PIL images"),
    "empty": ({"image": []}, "image: got list"),
    "sizes": (
        {"image": [GREY, GREY.resize((8, 8))]},
        r"image: got PIL images of the sizes \[\(8, 8\), \(16, 16\)\], expected one size",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_with_an_image_is_named(
    engine: PixelFlowEngine, case: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = case
    monkeypatch.setattr(CounterNoise, "initial", lambda *_: pytest.fail("noise was drawn"))
    with pytest.raises(ValueError, match=rf"^{message}"):
        engine([1, 2], **options)


def test_grey_pictures_have_one_channel() -> None:
    engine = packed_engine(checkpoint_of(random_reference(57, depth=1, channels=1), 3, 16))
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    options = {"num_inference_steps": 2, "start_stage": 2, "output_type": "pt"}
    expected = engine([1], image=torch.from_numpy(ramp)[None, None].float() / 255, **options).images
    assert torch.equal(engine([1], image=Image.fromarray(ramp), **options).images, expected)


@pytest.mark.parametrize(
    "options", [{"start_stage": 0, "strength": 0.9}, {"start_stage": 1, "strength": 0.96}, {"start_stage": 2}]
)
def test_a_warm_up_takes_what_a_call_takes(engine: PixelFlowEngine, options: dict[str, Any]) -> None:
    """Of its few steps a large strength would be all."""
    engine([1, 2], image=IMAGE, num_inference_steps=10, **options)
    engine.warmup([2], image=IMAGE, **options)
    with pytest.raises(ValueError, match=r"^strength: got 'much'"):
        engine.warmup([2], image=IMAGE, strength="much")


# --- defaults ------------------------------------------------------------------------------------------------


def test_guidance_is_by_default_what_was_published_for_the_kind_of_model() -> None:
    """Stage-wise for classes, constant for text (arXiv 2504.07963, section 4.3), none where nothing can guide."""
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "pt"}
    text = normal((2, 1, 3, 12), seeded(71), torch.float32)
    prompts = {"encoder_hidden_states": text[0], "null_encoder_hidden_states": text[1]}
    for kind, given, expected in (
        ({}, {"class_labels": [1]}, (1.0, 1 + 1.4 * (1 / 6 + 2 / 3) / 2, 2.4)),
        ({"num_classes": 0, "cross_attention_dim": 12}, prompts, (2.4, 2.4, 2.4)),
        ({"num_classes": 0}, {}, (1.0, 1.0, 1.0)),
    ):
        engine = packed_engine(checkpoint_of(random_reference(70, depth=1, **kind), 3, 16))
        out = engine(**given, **options)
        assert [stage.guidance_weight for stage in out.stages] == pytest.approx(expected)
        assert torch.equal(out.images, engine(**given, **options, guidance_schedule=list(expected)).images)


# --- what a call makes of odd arguments ----------------------------------------------------------------------


@by_engine
@pytest.mark.parametrize(("own", "empty"), [(5, 2), (2, 5)])
@pytest.mark.parametrize("masked", [True, False])
def test_prompts_are_as_long_as_the_longer(build: Build, own: int, empty: int, masked: bool) -> None:
    """As if the caller had padded and masked the shorter."""
    engine = build(checkpoint_of(random_reference(61, depth=1, num_classes=0, cross_attention_dim=12), 2, 8))
    lengths = {"": (2, own), "null_": (1, empty)}
    texts = {f"{name}encoder_hidden_states": normal((*size, 12), seeded(62), F32) for name, size in lengths.items()}
    masks = {f"{name}encoder_attention_mask": torch.ones(size, dtype=torch.int64) for name, size in lengths.items()}
    for mask in masks.values():
        mask[0, 1] = int(not masked)
    by_hand: dict[str, Tensor] = {name: F.pad(text, (0, 0, 0, 5 - text.shape[1])) for name, text in texts.items()}
    by_hand |= {name: F.pad(mask, (0, 5 - mask.shape[1])) for name, mask in masks.items()}
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_schedule": "constant"}
    found = engine(**options, **texts, **(masks if masked else {})).images
    assert torch.equal(found, engine(**options, **by_hand).images)


@by_engine
def test_warming_up_for_the_public_stream(build: Build) -> None:
    engine = build(checkpoint_of(random_reference(63, depth=1), 2, 8))
    engine.warmup([1, 2], noise="public")
    engine.warmup([1], noise="public", seed=None)


@by_engine
@pytest.mark.parametrize("given", [1, 2, 3])
@pytest.mark.parametrize("nulls", [1, 3])
def test_warming_up_repeats_prompts_to_every_batch_size(build: Build, given: int, nulls: int) -> None:
    engine = build(checkpoint_of(random_reference(65, depth=1, num_classes=0, cross_attention_dim=12), 2, 8))
    prompts: dict[str, Tensor] = {
        "encoder_hidden_states": normal((given, 3, 12), seeded(66), F32),
        "encoder_attention_mask": torch.tensor([[1, 1, 0]]).expand(given, -1),
        "null_encoder_hidden_states": normal((nulls, 3, 12), seeded(67), F32),
        "null_encoder_attention_mask": torch.ones(nulls, 3),
    }
    sizes: list[tuple[int, int]] = []
    plan = engine._plan

    def planned(call: Call) -> PlannedCall:
        found = plan(call)
        (run,) = found.runs
        assert run.condition.text is not None
        assert run.condition.null_text is not None
        sizes.append((len(run.condition.text.states), len(run.condition.null_text.states)))
        return found

    engine._plan = planned  # type: ignore[method-assign]
    engine.warmup([1, 2, 5], **prompts)
    assert sizes == [(batch, 1 if nulls == 1 else batch) for batch in (1, 2, 5)]


def test_warming_up_refuses_prompts_as_a_call_does() -> None:
    engine = exact_engine(checkpoint_of(random_reference(65, depth=1, num_classes=0, cross_attention_dim=12), 2, 8))
    for prompts in (None, torch.zeros(0, 3, 12), torch.zeros(()), torch.zeros(2, 3, 7)):
        with pytest.raises(ValueError, match=r"^encoder_hidden_states: got "):
            engine.warmup([2, 3], encoder_hidden_states=prompts, guidance_scale=1.0)


def test_a_step_of_no_length_tells_nothing_of_slopes() -> None:
    assert two_step_lengths(AB2, 0.25, 0.0) == (0.25, 0.0)
    assert two_step_lengths(AB2, 0.0, 0.0) == (0.0, 0.0)


@by_engine
def test_steps_that_a_shift_leaves_no_length(build: Build) -> None:
    """All of a stage in its first step, which is the starter's."""
    engine = build(checkpoint_of(random_reference(64, depth=1), 2, 8))
    options: dict[str, Any] = {"num_inference_steps": 4, "shift": 1e-9, "output_type": "pt"}
    found, starter = (engine([1, 2], solver=solver, **options).images for solver in ("ab2", AB2.starter))
    assert torch.equal(found, starter)

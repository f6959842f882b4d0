"""Mixed calls: images that differ in size, guidance and prompt are those of calls of their own, in their order."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request
from pixelflow_engine.events import StageReport
from pixelflow_engine.requests import sort_into_lots
from support.cascades import U32, checkpoint_of, exact_engine, packed_engine
from support.reference_models import normal, random_reference, seeded

KINDS = {"class": {}, "text": {"num_classes": 0, "cross_attention_dim": 12}}
ENGINES = {"exact": exact_engine, "packed": packed_engine}
by_engine = pytest.mark.parametrize("build", ENGINES.values(), ids=ENGINES)


def build_engines(kind: str = "class") -> tuple[PixelFlowEngine, PixelFlowEngine, PixelFlowEngine]:
    """Packed, exact and exact in float64, of three stages and 16 pixels."""
    checkpoint = checkpoint_of(random_reference(20, **KINDS[kind]), 3, 16)
    return packed_engine(checkpoint), exact_engine(checkpoint), exact_engine(checkpoint, torch.float64)


def mixed(kind: str) -> tuple[list[Request], dict[str, Any]]:
    """Sizes and weights in an order that sorting must undo, and what the call has besides."""
    generator = seeded(21)
    several = [(16, 16, 3.0), (8, 24, 1.0), (16, 16, 1.0), (8, 24, 2.0), (16, 16, 2.0), (24, 8, None)]
    null = normal((1, 5, 12), generator, torch.float32)
    requests = [
        Request(
            class_label=i % 6 if kind == "class" else None,
            seed=2**64 - 3 + i if i < 3 else i,
            guidance_scale=scale,
            height=None if height == 16 else height,
            width=width,
            encoder_hidden_states=normal((1 + i % 5, 12), generator, torch.float32) if kind == "text" else None,
        )
        for i, (height, width, scale) in enumerate(several)
    ]
    options: dict[str, Any] = {"num_inference_steps": [2, 1, 2], "output_type": "pt", "guidance_scale": 1.5}
    return requests, options | ({"null_encoder_hidden_states": null} if kind == "text" else {})


def alone(engine: PixelFlowEngine, request: Request, **options: Any) -> Tensor:
    """The image of a call that says with its own arguments what the request says."""
    own = {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if field.name not in ("class_label", "encoder_hidden_states") and getattr(request, field.name) is not None
    }
    if request.encoder_hidden_states is not None:
        states, null = request.encoder_hidden_states, options.pop("null_encoder_hidden_states")
        mask = (torch.arange(null.shape[1]) < len(states)).float()[None]
        padded = torch.zeros_like(null)
        padded[0, : len(states)] = states
        own |= {"encoder_hidden_states": padded, "encoder_attention_mask": mask, "null_encoder_hidden_states": null}
    (image,) = engine(None if request.class_label is None else [request.class_label], **(options | own)).images
    return image


@pytest.mark.parametrize("solver", ["euler", "ab2"])
@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_images_of_calls_of_their_own(kind: str, solver: str) -> None:
    packed, exact, truth = build_engines(kind)
    requests, options = mixed(kind)
    options["solver"] = solver
    expected = [alone(truth, request, **options) for request in requests]
    reference = [alone(exact, request, **options) for request in requests]
    for engine in (packed, exact):
        out = engine(requests, **options)
        assert isinstance(out.images, list)
        assert out.seeds == tuple(request.seed for request in requests)
        assert out.statuses == ("ok",) * len(requests)
        for i, image in enumerate(out.images):
            assert image.shape == (3, requests[i].height or 16, requests[i].width)
            bound = 2 * (reference[i] - expected[i]).abs().max().item() + 32 * U32
            assert (image - expected[i]).abs().max().item() <= bound, i


@by_engine
@pytest.mark.parametrize("batch_sizes", [None, (2,)])
@pytest.mark.parametrize("first_scale", [1.0, 2.5])
def test_an_empty_prompt_of_each_image_goes_where_its_image_goes(
    build: Any, batch_sizes: tuple[int, ...] | None, first_scale: float
) -> None:
    """Widths 16, 32 and 16 are sorted by size, an image without null halves comes last, and batches are filled up."""
    checkpoint, generator = checkpoint_of(random_reference(29, **KINDS["text"]), 2, 8), seeded(30)
    requests = [
        Request(
            seed=i,
            guidance_scale=scale,
            width=width,
            encoder_hidden_states=normal((2 + i, 12), generator, torch.float32),
        )
        for i, (width, scale) in enumerate([(16, first_scale), (32, 3.0), (16, 2.0)])
    ]
    nulls = normal((3, 5, 12), generator, torch.float32)
    mask = (torch.arange(5) < torch.tensor([[2], [5], [1]])).float()
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}

    def each(engine: PixelFlowEngine) -> list[Tensor]:
        return [
            alone(
                engine,
                request,
                **options,
                null_encoder_hidden_states=nulls[i : i + 1],
                null_encoder_attention_mask=mask[i : i + 1],
            )
            for i, request in enumerate(requests)
        ]

    expected, reference = each(exact_engine(checkpoint, torch.float64)), each(exact_engine(checkpoint))
    out = build(checkpoint, batch_sizes=batch_sizes)(
        requests, **options, null_encoder_hidden_states=nulls, null_encoder_attention_mask=mask
    )
    assert out.statuses == ("ok",) * 3
    for i, image in enumerate(out.images):
        bound = 2 * (reference[i] - expected[i]).abs().max().item() + 32 * U32
        assert (image - expected[i]).abs().max().item() <= bound, i


@by_engine
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
def test_requests_that_are_alike_have_the_bits_of_a_plain_call(build: Any, solver: str) -> None:
    engine = build(checkpoint_of(random_reference(22), 2, 8))
    options = {"solver": solver, "num_inference_steps": 2, "output_type": "pt", "rtol": 1e-2}
    labels, seeds = [3, 1, 5], [7, 2, 2**63]
    plain = engine(labels, seed=seeds, width=16, guidance_scale=2.0, **options).images
    for own, calls in (
        ({}, {"width": 16, "guidance_scale": 2.0}),
        ({"width": 16}, {"guidance_scale": 2.0}),
        ({"guidance_scale": 2.0, "width": 16, "height": 8}, {"width": 4, "height": 32, "guidance_scale": 7.0}),
    ):
        requests = [Request(class_label=label, seed=seed, **own) for label, seed in zip(labels, seeds, strict=True)]
        assert torch.equal(engine(requests, **calls, **options).images, plain)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_a_weight_of_each_image_has_the_bits_of_one_weight_for_all(solver: str) -> None:
    """Packs of one shape: weights of one image do not reach another, and one for all is each one's."""
    engine = packed_engine(checkpoint_of(random_reference(23), 2, 8))
    options = {"solver": solver, "num_inference_steps": 2, "output_type": "pt"}
    scales, labels = [2.0, 3.5, 0.25], [1, 4, 2]
    requests = [Request(class_label=c, seed=9, guidance_scale=w) for c, w in zip(labels, scales, strict=True)]
    images = engine(requests, **options).images
    for i, scale in enumerate(scales):
        assert torch.equal(images[i], engine(labels, seed=[9] * 3, guidance_scale=scale, **options).images[i])


@by_engine
def test_images_of_one_size_are_one_array_whatever_their_guidance(build: Any) -> None:
    engine = build(checkpoint_of(random_reference(24), 2, 8))
    requests = [Request(class_label=1, seed=i, guidance_scale=w) for i, w in enumerate([1.0, 2.0, 1.0])]
    tensor = engine(requests, num_inference_steps=1, output_type="pt").images
    array = engine(requests, num_inference_steps=1, output_type="np").images
    assert isinstance(tensor, Tensor)
    assert tensor.shape == (3, 3, 8, 8)
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())


@by_engine
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_several_sizes_in_three_forms(build: Any, channels: int) -> None:
    engine = build(checkpoint_of(random_reference(25, channels=channels), 2, 8))
    requests = [
        Request(class_label=1, seed=i, height=h, width=w) for i, (h, w) in enumerate([(8, 12), (4, 8), (8, 12)])
    ]
    forms = {form: engine(requests, num_inference_steps=1, output_type=form).images for form in ("pt", "np", "pil")}
    assert all(isinstance(images, list) and len(images) == 3 for images in forms.values())
    for tensor, array, picture in zip(*forms.values(), strict=True):
        assert isinstance(tensor, Tensor)
        assert tensor.dtype == torch.float32
        assert 0 <= tensor.min() < tensor.max() <= 1
        assert isinstance(array, np.ndarray)
        assert np.array_equal(array, tensor.permute(1, 2, 0).numpy())
        assert isinstance(picture, Image.Image)
        shown = np.asarray(picture)
        assert np.array_equal(shown if channels == 3 else shown[..., None], np.rint(array * 255).astype(np.uint8))
    assert [picture.size for picture in forms["pil"]] == [(12, 8), (8, 4), (12, 8)]


# --- reports -----------------------------------------------------------------------------------------------


def test_reports_of_batches_add_up() -> None:
    def report(height: int, tokens: int, weight: float, steps: int, evaluations: int, seconds: float) -> StageReport:
        return StageReport(
            stage=1,
            height=height,
            width=8,
            tokens=tokens,
            guidance_weight=weight,
            steps=steps,
            evaluations=evaluations,
            seconds=seconds,
        )

    together = StageReport.together([report(8, 16, 3.0, 7, 44, 0.5), report(32, 64, 1.0, 4, 26, 0.25)])
    assert together == report(32, 64, 3.0, 7, 70, 0.75)
    assert StageReport.together([together]) == together


def test_reports_of_a_mixed_call() -> None:
    packed, exact, _ = build_engines()
    requests, options = mixed("class")
    for engine, lots in ((packed, 1), (exact, 6)):
        stages = engine(requests, **options).stages
        assert [(s.stage, s.height, s.width, s.tokens) for s in stages] == [
            (0, 4, 4, 4),
            (1, 8, 8, 16),
            (2, 16, 16, 64),
        ]
        assert [s.evaluations for s in stages] == [2 * lots, 1 * lots, 2 * lots]
        assert [s.steps for s in stages] == [2, 1, 2]
        assert [s.guidance_weight for s in stages] == [1.0, pytest.approx(2.0, abs=0.4), 3.0]


def test_lots_of_images() -> None:
    sizes = [(8, 8), (16, 8), (8, 8), (8, 8), (16, 8)]
    weights = [(1.0, 1.0), (1.0, 2.0), (1.0, 2.0), (1.0, 3.0), (1.0, 1.0)]
    (lot,) = sort_into_lots(sizes, weights, mixed=True)
    assert sorted(lot.order) == list(range(5))
    places = iter(lot.order)
    for group in lot.groups:
        for weight in group.weights:
            i = next(places)
            assert (sizes[i], weights[i]) == ((group.height, group.width), weight)
    guided = [weights[i][1] != 1 for i in lot.order]
    assert guided == sorted(guided, reverse=True), "null halves come first"
    lots = sort_into_lots(sizes, weights, mixed=False)
    assert sorted(i for lot in lots for i in lot.order) == list(range(5))
    assert all(len({(sizes[i], weights[i]) for i in lot.order}) == 1 for lot in lots)


# --- the door ----------------------------------------------------------------------------------------------

GOOD = Request(class_label=1)
PROMPT = Request(encoder_hidden_states=torch.zeros(2, 12))
REFUSED: dict[str, tuple[str, list[Any], dict[str, Any], str]] = {
    "label": ("class", [GOOD, Request(class_label=6)], {}, r"class_labels\[1\]: class_label: got 6, expected an"),
    "no label": ("class", [GOOD, Request(seed=1)], {}, r"class_labels\[1\]: class_label: got None"),
    "truth": ("class", [Request(class_label=True)], {}, r"class_labels\[0\]: class_label: got True"),
    "seed": ("class", [GOOD, Request(class_label=1, seed=-1)], {}, r"class_labels\[1\]: seed: got -1"),
    "large seed": ("class", [Request(class_label=1, seed=2**64)], {}, r"class_labels\[0\]: seed: got 1844674407370"),
    "height": ("class", [GOOD, GOOD, Request(class_label=1, height=12)], {}, r"class_labels\[2\]: height: got 12"),
    "width": ("class", [Request(class_label=1, width=0)], {}, r"class_labels\[0\]: width: got 0"),
    "call's width": ("class", [GOOD], {"width": 9}, "width: got 9"),
    "call's scale": ("class", [GOOD], {"guidance_scale": float("nan")}, "guidance_scale: got nan"),
    "call's schedule": ("class", [GOOD], {"guidance_schedule": "linear"}, "guidance_schedule: got 'linear'"),
    "scale": ("class", [Request(class_label=1, guidance_scale=float("nan"))], {}, r"class_labels\[0\]: guidance_scale"),
    "text": ("class", [GOOD, PROMPT], {}, r"class_labels\[1\]: "),
    "both": (
        "class",
        [Request(class_label=1, encoder_hidden_states=torch.zeros(2, 12))],
        {},
        r"class_labels\[0\]: encoder",
    ),
    "class": ("text", [PROMPT, GOOD], {}, r"class_labels\[1\]: class_label: got 1, expected None for a model without"),
    "no prompt": ("text", [PROMPT, Request(seed=2)], {}, r"class_labels\[1\]: encoder_hidden_states: got NoneType"),
    "prompt's width": (
        "text",
        [Request(encoder_hidden_states=torch.zeros(2, 11))],
        {},
        r"class_labels\[0\]: encoder_hidden_states: got a tensor \(2, 11\)",
    ),
    "batch": ("text", [PROMPT, Request(encoder_hidden_states=torch.zeros(1, 2, 12))], {}, r"class_labels\[1\]: encod"),
    "empty prompt": ("text", [Request(encoder_hidden_states=torch.zeros(0, 12))], {}, r"class_labels\[0\]: encoder_h"),
    "integers": ("text", [Request(encoder_hidden_states=torch.zeros(2, 12).int())], {}, r"class_labels\[0\]: encoder"),
    "array": ("text", [Request(encoder_hidden_states=np.zeros((2, 12)))], {}, r"class_labels\[0\]: encoder"),
    "prompts apart": (
        "text",
        [PROMPT, Request(encoder_hidden_states=torch.zeros(2, 12, device="meta"))],
        {},
        r"class_labels\[1\]: encoder_hidden_states: got a tensor on meta, expected cpu, as of class_labels\[0\]$",
    ),
    "two prompts": (
        "text",
        [PROMPT],
        {"encoder_hidden_states": torch.zeros(1, 2, 12)},
        "encoder_hidden_states: got one",
    ),
    "mask": ("text", [PROMPT], {"encoder_attention_mask": torch.ones(1, 2)}, "encoder_attention_mask: got one beside"),
    "call's prompts": (
        "text",
        [Request(), Request()],
        {"encoder_hidden_states": torch.zeros(3, 2, 12), "guidance_scale": 1.0},
        "encoder_hidden_states: got 3, expected 2",
    ),
    "no null": ("text", [PROMPT], {}, "null_encoder_hidden_states: got NoneType"),
    "stranger": ("class", [GOOD, 2], {}, r"class_labels\[1\]: got 2, expected a Request"),
    "call's seeds": ("class", [GOOD], {"seed": np.array([3, 4])}, "seed: got 2 seeds, expected 1, one per image"),
    "call's seed": ("class", [GOOD], {"seed": 0.5}, "seed: got 0.5, expected an integer"),
    "public noise": ("class", [GOOD], {"noise": "public"}, "noise: got 'public', expected 'counter'"),
    "image": ("class", [GOOD], {"image": torch.zeros(1, 3, 16, 16)}, "image: got one beside requests"),
    "two weights": (
        "class",
        [GOOD, Request(class_label=1, guidance_scale=1.0)],
        {"guidance_schedule": [3.0, 3.0, 3.0]},
        r"class_labels\[1\]: guidance_scale: got 1.0 beside a list in guidance_schedule, expected None",
    ),
    "strength": ("class", [GOOD], {"strength": 0.5}, "image: got None with start_stage=0 and strength=0.5"),
}


@by_engine
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_with_a_request_is_named(build: Any, case: tuple[str, list[Any], dict[str, Any], str]) -> None:
    kind, requests, options, message = case
    engine = build(checkpoint_of(random_reference(26, depth=1, **KINDS[kind]), 3, 16))
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=rf"^{message}"):
        engine(requests, **options)


@by_engine
def test_what_a_request_does_not_say_is_the_calls(build: Any) -> None:
    engine = build(checkpoint_of(random_reference(27, **KINDS["text"]), 1, 4))
    text = normal((3, 1, 3, 12), seeded(28), torch.float32)
    common = {"num_inference_steps": 1, "output_type": "pt", "height": 8, "null_encoder_hidden_states": text[2]}
    requests = [Request(seed=4), Request(seed=5)]
    images = engine(requests, encoder_hidden_states=text[:2, 0], guidance_scale=2.0, **common).images
    plain = engine(encoder_hidden_states=text[:2, 0], seed=[4, 5], guidance_scale=2.0, **common).images
    assert torch.equal(images, plain)
    for call, expected in ((7, (7, 4)), ([8, 9], (8, 4)), (2**64 - 1, (2**64 - 1, 4))):
        seeded_by_call = engine([Request(), Request(seed=4)], encoder_hidden_states=text[:2, 0], seed=call, **common)
        assert seeded_by_call.seeds == expected
    assert engine([Request(), Request()], encoder_hidden_states=text[:2, 0], **common).seeds == (0, 1)
    fresh = engine([Request(), Request()], encoder_hidden_states=text[:2, 0], seed=None, **common)
    assert len({*fresh.seeds, 0, 1}) == 4


def test_callbacks_and_streams_want_one_batch() -> None:
    packed, exact, _ = build_engines()
    requests, options = mixed("class")
    with pytest.raises(ValueError, match="got one for images that run as 6 batches here"):
        exact(requests, callback_on_stage_end=lambda event: None, **options)
    with pytest.raises(ValueError, match="got images that run as 6 batches here"):
        exact.stream(requests, **options)
    with pytest.raises(ValueError, match="run as 6 batches"):
        packed.stream(requests, solver="dopri5", **options)
    latents = [event.latents for event in packed.stream(requests, **options)]
    sizes = [(request.height or 16, request.width) for request in requests]
    for shrink, images in zip((4, 2, 1), latents, strict=True):
        assert [tuple(image.shape[1:]) for image in images] == [(h // shrink, w // shrink) for h, w in sizes]
    for shown, image in zip(latents[-1], packed(requests, **options).images, strict=True):
        assert torch.equal((shown / 2 + 0.5).clamp(0, 1), image)

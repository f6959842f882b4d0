"""The fast engine in plain PyTorch against the reference, image by image: level D in float32, roundings in float64.

What runs here is packed tokens, programs and side-by-side weights; kernels, graphs and the compiler have tests of their
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request
from pixelflow_engine.fused import PackedText
from pixelflow_engine.fusion import fuse
from pixelflow_engine.model import CrossAttention, PatchEmbedder, SelfAttention
from pixelflow_engine.operations import Text
from pixelflow_engine.plan import Condition, Group, plan_stages
from pixelflow_engine.programs import FixedSteps
from pixelflow_engine.prompts import ProjectedPrompts
from pixelflow_engine.reference import guidance_weights
from pixelflow_engine.stage_pack import ModulationTable, StagePack
from pixelflow_engine.traceable import TraceableOperations
from pixelflow_kernels import PackedLayout
from support.cascades import (
    U32,
    U64,
    Picture,
    cascade,
    checkpoint_of,
    keep_programs,
    packed_engine,
)
from support.engines import tiny_config, tiny_model
from support.packs import draws
from support.reference_models import normal, random_reference, seeded

CLASSES, TEXT_WIDTH = 5, 12


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A small model and what is asked of it: one to four images that may differ in everything."""
    kind = draw(st.sampled_from(["class", "text", "both", "neither"]))
    stages, patch = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    side = patch * 2 ** (stages - 1)
    sizes = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]))
    scales = draw(st.permutations([2.4, 1.0, 0.0, -1.0]))  # so that images with and without guidance meet
    listed = st.lists(st.sampled_from([1.0, 2.0, 0.5]), min_size=stages, max_size=stages)
    named = ["stagewise", "constant"] if draw(st.booleans()) else ["constant"]
    images = [
        {
            "size": tuple(side * n for n in draw(sizes)),
            "scale": 1.0 if kind == "neither" else scales[i],
            "label": draw(st.integers(0, CLASSES)),
            "tokens": draw(st.integers(1, 5)),
            "seed": draw(st.integers(0, 2**64 - 1)),
        }
        for i in range(draw(st.sampled_from([4, 3, 2, 1])))
    ]
    return {
        "kind": kind,
        "model": {
            "heads": draw(st.sampled_from([1, 2, 3])),
            "head_dim": draw(st.sampled_from([4, 8, 20, 24, 72])),
            "depth": draw(st.sampled_from([1, 2])),
            "patch_size": patch,
            "channels": draw(st.sampled_from([1, 3])),
            "attention_bias": draw(st.booleans()),
            "num_classes": CLASSES if kind in ("class", "both") else 0,
            "cross_attention_dim": TEXT_WIDTH if kind in ("text", "both") else None,
        },
        "stages": stages,
        "resolution": side,
        "schedule": draw(st.sampled_from(named) if kind == "neither" else st.one_of(*map(st.just, named), listed)),
        "steps": draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages)),
        "solver": draw(st.sampled_from(["euler", "heun", "ab2"])),
        "shift": draw(st.sampled_from([1.0, 3.0])),
        "images": images,
        "seed": draw(st.integers(0, 2**31 - 1)),
    }


def pictures(case: dict[str, Any]) -> list[Picture]:
    """The images of a case, with the prompts that they have."""
    generator = seeded(case["seed"] + 1)
    null = normal((3, TEXT_WIDTH), generator, torch.float32)
    text, classes = case["kind"] in ("text", "both"), case["kind"] in ("class", "both")
    schedule, stages = case["schedule"], case["stages"]
    return [
        Picture(
            height=image["size"][0],
            width=image["size"][1],
            seed=image["seed"],
            weights=schedule if isinstance(schedule, list) else guidance_weights(image["scale"], stages, schedule),
            label=image["label"] if classes else None,
            prompt=normal((image["tokens"], TEXT_WIDTH), generator, torch.float32) if text else None,
            null=null if text else None,
        )
        for image in case["images"]
    ]


def asked(case: dict[str, Any], shown: list[Picture]) -> dict[str, Any]:
    """The case in the engine's words; the empty prompt is padded to the longest."""
    options: dict[str, Any] = {
        "num_inference_steps": case["steps"],
        "guidance_schedule": case["schedule"],
        "solver": case["solver"],
        "shift": case["shift"],
        "output_type": "pt",
    }
    null = shown[0].null
    if null is not None:
        longest = max(len(p.prompt) for p in shown if p.prompt is not None)
        if longest < len(null):  # so that the prompts are padded, the first of them is lengthened by padding
            options |= {"null_encoder_hidden_states": null[None, :longest]}
        else:
            options["null_encoder_hidden_states"] = F.pad(null, (0, 0, 0, longest - len(null)))[None]
            options["null_encoder_attention_mask"] = (torch.arange(longest) < len(null)).float()[None]
    requests = [
        Request(
            class_label=p.label,
            seed=p.seed,
            guidance_scale=None if isinstance(case["schedule"], list) else image["scale"],
            height=p.height,
            width=p.width,
            encoder_hidden_states=p.prompt,
        )
        for p, image in zip(shown, case["images"], strict=True)
    ]
    return options | {"class_labels": requests}


def run(engine: PixelFlowEngine, options: dict[str, Any]) -> list[list[Tensor]]:
    """The state of each image at the end of each stage."""
    ends: list[list[Tensor]] = []
    engine(**options, callback_on_stage_end=lambda event: ends.append(list(event.latents)))
    return ends


def shortened(shown: list[Picture]) -> list[Picture]:
    """As the engine is asked: an empty prompt that is longer than every prompt is cut."""
    if shown[0].null is None or shown[0].prompt is None:
        return shown
    longest = max(len(p.prompt) for p in shown if p.prompt is not None)
    return [replace(p, null=None if p.null is None else p.null[:longest]) for p in shown]


@draws(30)
@given(case=cases())
def test_every_image_of_a_pack_is_the_references_image_alone(case: dict[str, Any]) -> None:
    model = random_reference(case["seed"], **case["model"])
    shown = pictures(case)
    options = asked(case, shown)
    how = (case["steps"], case["solver"], case["shift"])
    truth = [cascade(model, picture, *how) for picture in shortened(shown)]
    plain = [cascade(model.float(), picture, *how) for picture in shortened(shown)]
    checkpoint = checkpoint_of(model.double(), case["stages"], case["resolution"])
    single = run(packed_engine(checkpoint), options)
    double = run(packed_engine(checkpoint, torch.float64), options)
    assert len(single) == len(double) == case["stages"]
    rounds = 0
    for stage in range(case["stages"]):
        rounds += case["steps"][stage] + 1
        # Of all images together: how near float32 comes to one number is luck.
        reference = max((plain[i][stage] - truth[i][stage]).abs().max().item() for i in range(len(shown)))
        for i in range(len(shown)):
            exact, size = truth[i][stage], truth[i][stage].abs().max().item()
            assert single[stage][i].dtype == torch.float32
            assert double[stage][i].dtype == torch.float64
            # Level D: at most twice as far as the reference in float32. Every step, and every entry, adds the roundings
            # of the some thirty operations that follow each other in the model.
            error = (single[stage][i] - exact).abs().max().item()
            assert error <= 2 * reference + 32 * rounds * U32 * size, (stage, i, error, reference)
            # The same roundings 2^29 times smaller, stretched by the model as float32's are.
            error = (double[stage][i] - exact).abs().max().item()
            assert error <= (2 * reference / U32 + 32 * rounds * size) * U64, (stage, i, error, reference)


# --- weights side by side ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [{}, {"attention_bias": False}, {"num_classes": 0, "cross_attention_dim": 12}], ids=str
)
def test_fused_weights_keep_names_values_and_memory(overrides: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(depth=2, **overrides)).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    def shares(part: Tensor, whole: Tensor, start: int) -> bool:
        return part.data_ptr() == whole[start].data_ptr() and part.stride() == whole.stride()

    g, C = seeded(3), model.config.width
    u = normal((7, C), g, torch.float32)
    for i, block in enumerate(model.blocks):
        attention = block.attn1
        for j, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
            assert shares(linear.weight, attention.qkv.weight, j * C)
            assert linear.bias is None or shares(linear.bias, attention.qkv.bias, j * C)
            product = attention.qkv(u)[:, j * C : (j + 1) * C]
            assert (product - F.linear(u, linear.weight, linear.bias)).abs().max() < 1e-5
        assert shares(block.norm1.linear.weight, model.all_modulations.weight, 6 * C * i)
        assert shares(block.norm1.linear.bias, model.all_modulations.bias, 6 * C * i)
    assert shares(model.proj_out_1.weight, model.all_modulations.weight, 12 * C)
    several = model.modulations(u)
    activated = F.silu(u)
    alone = [*(block.norm1(activated) for block in model.blocks), model.proj_out_1(activated)]
    assert [rows.shape for rows in several] == [(7, 6 * C), (7, 6 * C), (7, 2 * C)]
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(several, alone, strict=True))
    images = normal((2, 3, 4, 6), g, torch.float32)
    patches = F.unfold(images, 2, stride=2).transpose(1, 2).flatten(0, 1)
    by_pixel = patches.unflatten(1, (3, 4)).transpose(1, 2).flatten(1)
    embedded = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=2)
    expected = embedded.flatten(2).transpose(1, 2).flatten(0, 1)
    assert (model.patch_embed.embed_by_pixel(by_pixel) - expected).abs().max() < 1e-5


# --- what is computed once, and what not at all ------------------------------------------------------------


def test_states_come_back_from_their_pack() -> None:
    config = tiny_config(num_stages=2, in_channels=1, out_channels=1)
    model = tiny_model(config).requires_grad_(False)
    groups = [Group(16, 8, ((1.0, 2.0),) * 2), Group(8, 24, ((1.0, 1.0),))]
    _, plan = plan_stages(config, groups, (1, 1))
    pack = StagePack(model, plan)
    states = [normal(shape, seeded(i), torch.float32) for i, shape in enumerate(plan.shapes)]
    x = pack.pack(states)
    assert x.shape == (2 * 32 + 48, 4)
    assert torch.equal(x[32 + 4 * 2 + 1], states[0][1, 0, 4:6, 2:4].flatten()), "row 2, column 1 of the second image"
    assert torch.equal(x[64 + 12 * 3 + 7], states[1][0, 0, 6:8, 14:16].flatten())
    for before, after in zip(states, pack.unpack(x), strict=True):
        assert torch.equal(before, after)
        assert after.is_contiguous()
        assert after.data_ptr() != x.data_ptr()
    assert pack.layout.grids == ((8, 4), (8, 4), (8, 4), (8, 4), (4, 12)), "null halves first, the unguided last"
    assert pack.latent_size.tolist() == [4, 4, 4, 4, 12]


def test_the_modulation_table_is_the_conditioning_of_every_step() -> None:
    config = tiny_config(num_stages=1, depth=2)
    model = tiny_model(config).double().requires_grad_(False)
    fuse(model)
    groups = [Group(8, 8, ((2.0,),) * 3), Group(16, 4, ((3.0,),)), Group(4, 16, ((1.0,),) * 2)]
    (plan,) = plan_stages(config, groups, (4,))
    pack = StagePack(model, plan)
    condition = Condition(class_labels=torch.tensor([1, 2, 1, 1, 0, 0]))
    times = [3.0, 250.3, 999.0]
    table = ModulationTable(pack, condition, times)
    told = [(4, 5), (4, 5), (4, 5), (2, 5), (4, 1), (4, 2), (4, 1), (2, 1), (8, 0), (8, 0)]  # null halves first
    assert table.rows.shape[:2] == (3, len({*told[:4]}) + 6), "null halves of one size share a row"
    for moment, t in enumerate(times):
        rows = model.split_modulations(table.at(moment))
        for i, (size, label) in enumerate(told):
            single = [torch.tensor([value]) for value in (torch.tensor(t).item(), size, label)]
            c = F.silu(model.conditioning(single[0], single[1], single[2]))
            alone = [*(block.norm1.linear(c) for block in model.blocks), model.proj_out_1(c)]
            for part, expected in zip(rows, alone, strict=True):
                assert (part[i] - expected[0]).abs().max() < 1e-12 * expected.abs().max()


class Seen:
    """Counts calls of a method and remembers what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cls: type, method: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        original: Callable[..., Any] = getattr(cls, method)

        def seen(*args: Any, **keywords: Any) -> Any:
            self.calls.append(args)
            return original(*args, **keywords)

        monkeypatch.setattr(cls, method, seen)


def test_patches_are_embedded_once_and_nothing_for_weight_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = packed_engine(checkpoint_of(random_reference(4), 3, 16))
    embedded = Seen(monkeypatch, PatchEmbedder, "embed_by_pixel")
    attended = Seen(monkeypatch, SelfAttention, "forward")
    calls = {"num_inference_steps": [2, 1, 3], "guidance_schedule": [1.0, 2.0, 1.0], "output_type": "pt"}
    engine([1, 2], **calls)
    assert [len(tokens) for _, tokens in embedded.calls] == [2 * 4] * 2 + [2 * 16] + [2 * 64] * 3
    attended_tokens = [len(u) for _, u, *_ in attended.calls][::2]  # of the first of two blocks
    assert attended_tokens == [2 * 4] * 2 + [4 * 16] + [2 * 64] * 3
    attended.calls.clear()
    requests = [Request(class_label=1, seed=1, guidance_scale=1.0), Request(class_label=2, seed=2, guidance_scale=3.0)]
    engine(requests, num_inference_steps=1, guidance_schedule="constant")
    assert [len(u) for _, u, *_ in attended.calls][::2] == [3 * 4, 3 * 16, 3 * 64]


def test_prompts_are_what_text_models_take_and_no_others() -> None:
    g = seeded(11)
    layout = PackedLayout.from_grids([(2, 2)])
    tokens, text = normal((4, 12), g, torch.float32), Text(normal((1, 3, 12), g, torch.float32))
    size = torch.tensor([2])
    for width, prompts, got in ((12, None, "None, expected prompts"), (None, text, "prompts, expected None")):
        model = tiny_model(tiny_config(num_classes=0, cross_attention_dim=width))
        p = model.config.patch_size
        with pytest.raises(ValueError, match=f"^text: got {got}"):
            model(tokens.repeat(1, p * p * 3 // 12), torch.tensor([5.0]), layout, size, None, prompts)


def test_prompts_are_projected_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_reference(5, num_classes=0, cross_attention_dim=12)
    projected = Seen(monkeypatch, CrossAttention, "text_keys")
    engine = packed_engine(checkpoint_of(model, 3, 16))
    text = normal((3, 4, 12), seeded(6), torch.float32)
    prompts = {"encoder_hidden_states": text[:2], "null_encoder_hidden_states": text[2:]}
    engine(num_inference_steps=3, guidance_schedule="constant", solver="ab2", **prompts)
    assert len(projected.calls) == 2, "one for each of two blocks"
    projected.calls.clear()
    engine(num_inference_steps=2, **prompts)  # the first stage has no null half
    assert [tuple(tokens.states.shape) for _, tokens, _ in projected.calls] == [(3 * 4, 12)] * 2, "one empty prompt"
    projected.calls.clear()
    nulls = {"null_encoder_hidden_states": text[1:]}
    engine(num_inference_steps=2, guidance_schedule="constant", **(prompts | nulls))
    assert [tuple(tokens.states.shape) for _, tokens, _ in projected.calls] == [(4 * 4, 12)] * 2, "one for each image"


@pytest.mark.parametrize("plain", [False, True])
def test_prompts_handed_out_are_those_of_the_pack(plain: bool) -> None:
    """Whatever was projected together: an image's keys are those of its own prompt, and of its own empty one."""
    config = tiny_config(num_stages=1, num_classes=0, cross_attention_dim=12)
    model = tiny_model(config).double().requires_grad_(False)
    if not plain:
        model.operations = TraceableOperations()
    g = seeded(9)
    prompts = Text(normal((3, 5, 12), g), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0.0]]))
    for nulls in (1, 3):
        null = Text(normal((nulls, 5, 12), g), (torch.arange(5) < 2).float().expand(nulls, -1))
        projected = ProjectedPrompts(model, prompts, null)
        for guided in (0, 1, 3):
            found = projected.pack(guided)
            first = Text(null.for_each(3).states[:guided], null.for_each(3).mask[:guided])
            alone = model.prompts(Text.concatenate(first, prompts) if guided else prompts)
            assert [x.shape for pair in found.keys for x in pair] == [x.shape for pair in alone.keys for x in pair]
            for (k, v), (k_alone, v_alone) in zip(found.keys, alone.keys, strict=True):
                assert (k - k_alone).abs().max() < 1e-13
                assert (v - v_alone).abs().max() < 1e-13
            if isinstance(found.text, PackedText):
                assert torch.equal(found.text.cu_seqlens, alone.text.cu_seqlens)
            else:
                assert torch.equal(found.text.mask, alone.text.mask)


# --- programs that are used again --------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
def test_programs_serve_other_calls_of_their_shape(solver: str) -> None:
    """Everything that differs between two calls is loaded, and nothing of the last one is left."""
    model = random_reference(7, cross_attention_dim=12)
    checkpoint = checkpoint_of(model, 2, 8)
    fresh, kept = packed_engine(checkpoint), packed_engine(checkpoint)
    keep_programs(kept)
    text = normal((4, 2, 5, 12), seeded(8), torch.float32)
    masks = [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]]
    null = {
        "null_encoder_hidden_states": text[3, :1],
        "null_encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
    }
    for i, (labels, scale, rtol) in enumerate([([1, 2], 2.4, 1e-2), ([5, 0], 0.5, 3e-2), ([1, 1], 3.0, 1e-1)]):
        options: dict[str, Any] = {
            "class_labels": labels,
            "seed": [i, 10 + i],
            "guidance_scale": scale,
            "guidance_schedule": "constant",
            "num_inference_steps": [2 + i, 3],
            "solver": solver,
            "encoder_hidden_states": text[i],
            "encoder_attention_mask": torch.tensor(masks[i]),
            **null,
        }
        options |= {"rtol": rtol} if solver == "dopri5" else {"shift": 1.0 + i}
        for expected, got in zip(run(fresh, options), run(kept, options), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), i
    assert len(kept._programs.programs) == 2
    assert not fresh._programs.programs
    kept.close()
    assert not kept._programs.programs


def test_weights_of_each_image_are_loaded_into_a_kept_program() -> None:
    checkpoint = checkpoint_of(random_reference(9), 1, 4)
    fresh, kept = packed_engine(checkpoint), packed_engine(checkpoint)
    keep_programs(kept)
    for scales in ([2.0, 3.0, 1.0], [4.0, 0.5, 1.0], [2.0, 2.0, 1.0], [2.0, 2.0, 2.0], [1.0, 1.0, 1.0]):
        requests = [Request(class_label=1, seed=i, guidance_scale=scale) for i, scale in enumerate(scales)]
        options = {"class_labels": requests, "num_inference_steps": 2}
        assert all(torch.equal(a, b) for a, b in zip(run(fresh, options)[0], run(kept, options)[0], strict=True))
    assert sum(isinstance(program, FixedSteps) for program in kept._programs.programs.values()) == 4


def test_two_streams_through_kept_programs_do_not_meet() -> None:
    """One stage of each in turn: a program's tensors are its own, not those of the call that made it."""
    model = random_reference(10, num_classes=0, cross_attention_dim=12)
    fresh, kept = packed_engine(checkpoint_of(model, 3, 16)), packed_engine(checkpoint_of(model, 3, 16))
    keep_programs(kept)
    text = normal((3, 1, 4, 12), seeded(11), torch.float32)
    calls = [
        {
            "seed": i,
            "encoder_hidden_states": text[i],
            "null_encoder_hidden_states": text[2],
            "num_inference_steps": 2,
            "guidance_schedule": "constant",
        }
        for i in range(2)
    ]
    expected = [[event.latents for event in fresh.stream(**call)] for call in calls]
    for stage, events in enumerate(zip(*(kept.stream(**call) for call in calls), strict=True)):
        for call, event in zip(expected, events, strict=True):
            assert torch.equal(event.latents, call[stage])

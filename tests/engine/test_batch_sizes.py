"""Batches of given sizes: filled up with copies that nobody sees, divided where they are too large, independent.

One thread and a width of 32, so that a CPU's own reasons for rounding by place do not come in (see test_independence).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request
from pixelflow_engine.plain_stages import PlainStages
from support.engines import tiny_config, tiny_model
from support.kernels import assert_same_bits
from support.recording import RecordingCapture, packed_engine

WIDE = {"num_attention_heads": 2, "attention_head_dim": 16}
SIZES = (4, 8)
COARSE = {"rtol": 0.2, "atol": 0.05, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(engine: PixelFlowEngine, labels: Any, **options: Any) -> Tensor:
    """Of one batch, before they are clamped to what can be shown."""
    *_, end = engine.stream(labels, **(COARSE | options))
    assert isinstance(end.latents, Tensor)
    return end.latents


def shown(engine: PixelFlowEngine, labels: Any, **options: Any) -> Tensor:
    """Of any number of batches."""
    found = engine(labels, output_type="pt", **(COARSE | options)).images
    assert isinstance(found, Tensor)
    return found


def exact_engine(batch_sizes: tuple[int, ...] | None, **options: Any) -> PixelFlowEngine:
    config = tiny_config(**(WIDE | options))
    return PixelFlowEngine(config, tiny_model(config), "torch", batch_sizes=batch_sizes)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dopri5"])
def test_an_image_alone_is_the_image_in_any_batch(solver: str) -> None:
    """Whose mates may have its own class, or another."""
    engine = packed_engine(capture := RecordingCapture(), batch_sizes=SIZES[:1], **WIDE)
    labels, seeds = [1, 1, 3, 5], [10, 11, 12, 13]
    alone = torch.cat([images(engine, [c], seed=[s], solver=solver) for c, s in zip(labels, seeds, strict=True)])
    captured = capture.captured
    for batch in (2, 3, 4):
        assert_same_bits(images(engine, labels[:batch], seed=seeds[:batch], solver=solver), alone[:batch])
    assert capture.captured == captured, "one batch size, one set of graphs"


@pytest.mark.parametrize("compiled", [False, True])
def test_without_sizes_the_others_do_matter(compiled: bool) -> None:
    """The negative control: a product of other rows rounds otherwise."""
    engine = packed_engine(**WIDE) if compiled else exact_engine(None)
    labels = [i % 6 for i in range(16)]
    together = images(engine, labels, seed=10)
    alone = torch.cat([images(engine, [c], seed=10 + i) for i, c in enumerate(labels)])
    assert torch.allclose(together, alone, atol=1e-3)
    assert not torch.equal(together, alone)


@pytest.mark.parametrize("batch", [1, 4, 5, 8, 9, 13, 17])
def test_what_is_larger_runs_in_several_batches(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    run = PlainStages.run

    def counted(self: PlainStages, states: Any, *more: Any) -> Any:
        ran.append(len(states[0]))
        return run(self, states, *more)

    monkeypatch.setattr(PlainStages, "run", counted)
    engine = exact_engine(SIZES)
    labels = [i % 6 for i in range(batch)]
    out = engine(labels, seed=3, output_type="pt", num_inference_steps=1)
    rest = batch % 8
    assert ran == [size for size in [8] * (batch // 8) + [4 if rest <= 4 else 8] * (rest > 0) for _ in range(3)]
    assert out.images.shape == (batch, 3, 16, 16)
    assert out.seeds == tuple(range(3, 3 + batch))
    assert out.statuses == ("ok",) * batch
    expected = exact_engine(None)(labels, seed=3, output_type="pt", num_inference_steps=1).images
    assert torch.allclose(out.images, expected, atol=1e-4)


def test_requests_keep_their_order() -> None:
    requests = [
        Request(class_label=i % 5, seed=i, guidance_scale=[1.0, 2.0, 3.0][i % 3], width=[16, 32][i % 2])
        for i in range(11)
    ]
    found = packed_engine(batch_sizes=SIZES, **WIDE)(requests, output_type="np", num_inference_steps=2)
    expected = packed_engine(**WIDE)(requests, output_type="np", num_inference_steps=2)
    for mine, theirs in zip(found.images, expected.images, strict=True):
        assert np.allclose(mine, theirs, atol=1e-4)
    assert found.seeds == tuple(range(11))
    assert len(found.statuses) == 11


def test_given_images_are_filled_and_divided_too() -> None:
    given = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for image in (given, given[:1]):
        call = {"image": image, "start_stage": 1, "strength": 0.5, "num_inference_steps": 4}
        found = shown(packed_engine(batch_sizes=(4,), **WIDE), range(6), **call)
        assert torch.allclose(found, shown(packed_engine(**WIDE), range(6), **call), atol=1e-4)


def test_callbacks_and_streams_see_no_copies() -> None:
    engine, seen = packed_engine(RecordingCapture(), batch_sizes=(4,), **WIDE), []
    first, second = (images(engine, [1, 2, 3], seed=seed) for seed in (5, 6))
    assert not torch.equal(first, second)

    def half(event: Any) -> Tensor:
        seen.append(tuple(event.latents.shape))
        return event.latents * 0.5

    images(engine, [1, 2, 3], callback_on_step_end=half, callback_on_stage_end=lambda e: seen.append(e.latents.shape))
    assert seen == [(3, 3, size, size) for size in (4, 8, 16) for _ in range(3)]
    *_, end = engine.stream([1, 2, 3], seed=5, **COARSE)
    assert_same_bits(end.latents, first)
    with pytest.raises(ValueError, match=r"callback_on_step_end.* 2 batches"):
        images(engine, range(5), callback_on_step_end=half)
    with pytest.raises(ValueError, match="class_labels: got images that run as 2 batches"):
        engine.stream(range(5))


def test_an_image_that_fails_is_named_once() -> None:
    engine = packed_engine(batch_sizes=(4,), **WIDE)
    with torch.no_grad():
        engine.model.class_embedder.embedding_table.weight[2] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match=r"images \[2\] of the batch"):
        images(engine, [0, 1, 2])
    out = engine([2, 0, 1, 0, 1, 2], on_failure="report", output_type="pt", num_inference_steps=1)
    assert out.statuses == ("nonfinite", "ok", "ok", "ok", "ok", "nonfinite")


@pytest.mark.parametrize("option", [{"noise": "public"}, {"solver": "dopri5", "error_norm": "batch"}])
def test_nothing_is_filled_where_an_image_depends_on_the_whole_batch(option: dict[str, Any]) -> None:
    for batch in (3, 5):
        call = {"labels": range(batch)} | option
        assert_same_bits(images(packed_engine(batch_sizes=(4,), **WIDE), **call), images(packed_engine(**WIDE), **call))


@pytest.mark.parametrize("sizes", [[], [0], [2.5], 4, ["a"], [True]])
def test_what_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch_sizes"):
        exact_engine(sizes)


def test_sizes_may_come_in_any_order() -> None:
    assert exact_engine((8, 2, 8)).batch_sizes == (2, 8)  # type: ignore[arg-type]

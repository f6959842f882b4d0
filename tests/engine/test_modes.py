"""Modes of PyTorch that a caller may have set: an engine computes as it was made, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, StepEvent
from pixelflow_engine import noise as noise_module
from pixelflow_engine.continuous import Underway, euler_step
from support.engines import tiny_config, tiny_engine, tiny_model, uncompiled
from support.recording import RecordingCapture, packed_engine


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "narrow default dtype": lambda: default_dtype(torch.bfloat16),
    # Any tensor whose device is left open would be without values: stricter than a GPU as the default.
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "grad mode": torch.enable_grad,
}
CALLS: dict[str, dict[str, Any]] = {
    "euler": {},
    "ab2": {"solver": "ab2"},
    "dopri5": {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2},
    "published noise": {"noise": "public"},
    "an image": {"image": torch.full((1, 3, 16, 16), 0.5), "strength": 0.5},
}


def sampled(engine: PixelFlowEngine, **options: Any) -> Tensor:
    out = engine([1, 2], **({"num_inference_steps": 2, "seed": 1, "output_type": "pt"} | options)).images
    assert isinstance(out, Tensor)
    return out


@pytest.fixture(scope="module")
def engines() -> dict[str, PixelFlowEngine]:
    config = tiny_config()
    with uncompiled():
        packed = PixelFlowEngine(config, tiny_model(config), compile=True)
    return {"exact": tiny_engine(), "packed": packed, "captured": packed_engine(RecordingCapture())}


@pytest.mark.parametrize("kind", ["exact", "packed", "captured"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_a_callers_modes_change_no_bit(call: str, mode: str, kind: str, engines: dict[str, PixelFlowEngine]) -> None:
    """Level A between the modes."""
    engine = engines[kind]
    want = sampled(engine, **CALLS[call])
    noise_module._block_product.cache_clear()  # what is found out inside a mode is used outside, too
    with MODES[mode]():
        got = sampled(engine, **CALLS[call])
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(sampled(engine, **CALLS[call]), want)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_what_was_captured_inside_a_mode_serves_outside(mode: str, call: str) -> None:
    engine = packed_engine(RecordingCapture())
    with MODES[mode]():
        got = sampled(engine, **CALLS[call])
    assert torch.equal(sampled(engine, **CALLS[call]), got)


def test_callbacks_have_the_callers_inference_mode() -> None:
    """Their own tensors are of that mode, and only inside it can they be written to."""
    total, seen = torch.inference_mode()(lambda: torch.zeros(()))(), []

    def add(event: StepEvent) -> None:
        assert isinstance(event.latents, Tensor)
        seen.append(torch.is_inference_mode_enabled())
        total.add_(event.latents.sum()) if seen[-1] else None

    for engine in (tiny_engine(), packed_engine(RecordingCapture())):
        with torch.inference_mode():
            sampled(engine, callback_on_step_end=add)
        assert {*seen} == {True}
        sampled(engine, callback_on_step_end=add)
        assert not seen.pop()
        seen.clear()


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_may_be_loaded_inside_a_mode(mode: str) -> None:
    def velocity(engine: PixelFlowEngine) -> tuple[Tensor, Tensor]:
        x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32).requires_grad_()
        v = engine.velocity(x, 500.0, class_labels=[1, 2])
        v.square().sum().backward()
        assert x.grad is not None
        return v, x.grad

    with MODES[mode]():
        engine = PixelFlowEngine.from_pretrained("digits")
        sampled(engine, num_inference_steps=1)
    for got, want in zip(velocity(engine), velocity(PixelFlowEngine.from_pretrained("digits")), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_a_callers_modes_change_no_velocity(mode: str, engines: dict[str, PixelFlowEngine]) -> None:
    """A time that no half type has."""
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    want = engines["exact"].velocity(x, 999.3, class_labels=1)
    with MODES[mode]():
        got = engines["exact"].velocity(x, 999.3, class_labels=1)
    assert torch.equal(got, want)


def test_velocities_are_not_cast(engines: dict[str, PixelFlowEngine]) -> None:
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    want = engines["exact"].velocity(x, 500.0, class_labels=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engines["exact"].velocity(x, 500.0, class_labels=1), want)


def test_a_continuous_step_is_not_cast(engines: dict[str, PixelFlowEngine]) -> None:
    x = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)
    images = [Underway(latents=x, t_model=500.0, step=0.1, weight=2.0, class_label=1)]
    (want,) = euler_step(engines["packed"].model, images)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = euler_step(engines["packed"].model, images)
    assert torch.equal(got, want)


def test_callbacks_have_the_callers_autocast(engines: dict[str, PixelFlowEngine]) -> None:
    seen = []

    def look(event: StepEvent) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    with torch.autocast("cpu", torch.float16):
        sampled(engines["exact"], callback_on_step_end=look)
    assert {*seen} == {(True, torch.float16)}
    sampled(engines["exact"], callback_on_step_end=look)
    assert not seen[-1][0]

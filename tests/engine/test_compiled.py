"""Compiled engines: whole blocks without a break, few graphs for any images, level D against the exact engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, Request, compilation
from pixelflow_kernels.varlen_attention import backends
from support.engines import tiny_config, tiny_engine, tiny_model

CLOSE = {"rtol": 0, "atol": 2e-5}  # of images in [0, 1] after a few steps in float32


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace whole graphs and run them as they are: a second instead of ten."""
    monkeypatch.setattr(compilation.torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture
def kernels_as_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the fused operations run their plain implementations, as one node each."""
    monkeypatch.setattr(backends, "why_not", lambda *_: None)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def images(engine: PixelFlowEngine, *arguments: Any, **options: Any) -> list[Tensor]:
    found = engine(*arguments, output_type="pt", num_inference_steps=2, **options).images
    return list(found)  # type: ignore[arg-type]


def assert_same_images(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)  # type: ignore[arg-type]


CALLS: list[tuple[Any, dict[str, Any]]] = [
    ([1], {}),
    ([1, 2], {"guidance_scale": 1.0}),
    ([0, 3, 2], {"solver": "heun"}),
    ([4, 4, 4, 4, 1], {"height": 24}),
    ([Request(class_label=1, seed=3), Request(class_label=2, seed=4, guidance_scale=1.0, height=32)], {}),
    ([Request(class_label=c, seed=c, width=w, guidance_scale=c) for c, w in ((1, 24), (2, 16), (3, 40))], {}),
    ([2, 0], {"width": 48, "solver": "ab2"}),
]


def test_a_few_graphs_serve_any_images() -> None:
    """Through Inductor, with oneDNN's products."""
    exact, compiled = tiny_engine(), PixelFlowEngine(tiny_config(), tiny_model(tiny_config()), compile=True)
    assert not compiled.exact
    before = graphs()
    torch._dynamo.utils.counters["graph_break"].clear()
    for asked, options in CALLS:
        assert_same_images(images(compiled, asked, **options), images(exact, asked, **options))
    assert 1 <= graphs() - before <= 5
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_text_is_traced_whole(traced_only: None, kernels_as_plain_operations: None, backend: str) -> None:
    config = tiny_config(2, 8, num_classes=0, cross_attention_dim=12)
    exact = PixelFlowEngine(config, tiny_model(config))
    compiled = PixelFlowEngine(config, tiny_model(config), backend, compile=True)
    generator = torch.Generator().manual_seed(0)
    before = graphs()
    for batch, tokens in ((1, 3), (2, 3), (3, 7)):
        text = torch.randn(batch + 1, tokens, 12, generator=generator)
        mask = torch.ones(batch, tokens)
        mask[0, tokens // 2 :] = 0
        call = {
            "encoder_hidden_states": text[:batch],
            "encoder_attention_mask": mask,
            "null_encoder_hidden_states": text[batch:],
        }
        assert_same_images(images(compiled, **call), images(exact, **call))
    assert 1 <= graphs() - before <= 5


def test_the_fused_block_is_traced_whole(traced_only: None, kernels_as_plain_operations: None) -> None:
    exact, compiled = tiny_engine(), PixelFlowEngine(tiny_config(), tiny_model(tiny_config()), "triton", compile=True)
    before = graphs()
    torch._dynamo.utils.counters["graph_break"].clear()
    for asked, options in CALLS:
        assert_same_images(images(compiled, asked, **options), images(exact, asked, **options))
    assert 1 <= graphs() - before <= 5


def test_a_callers_default_device_is_traced_past(traced_only: None) -> None:
    """It is a mode, under which methods of tensors that PyTorch writes in Python cannot be traced."""
    config = tiny_config()
    with torch.device("cpu"):
        got = images(PixelFlowEngine(config, tiny_model(config), compile=True), [1])
    want = images(PixelFlowEngine(config, tiny_model(config), compile=True), [1])
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("limited", [False, True], ids=["a limit of ours", "dynamo's limit"])
def test_engines_do_not_use_up_each_others_graphs(
    traced_only: None, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    """Graphs are counted by code; every engine's blocks have code of their own."""
    if limited:  # an older PyTorch's function
        whole = torch.compile

        def older(model: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
            return whole(model, fullgraph=fullgraph)

        monkeypatch.setattr(compilation.torch, "compile", older)
    most = torch._dynamo.config.recompile_limit
    before, made = graphs(), []
    while graphs() - before <= most + 1:
        config = tiny_config(1, 8, attention_head_dim=8 * (1 + len(made)))
        made.append(PixelFlowEngine(config, tiny_model(config), compile=True))
        images(made[-1], [1])
        images(made[-1], [1, 2, 3])
    images(made[0], [1, 2])


def test_gradients_pass_through_a_compiled_engine() -> None:
    """Through oneDNN's products, whose layers need no gradients of their own."""
    exact, compiled = tiny_engine(1, 8), PixelFlowEngine(tiny_config(1, 8), tiny_model(tiny_config(1, 8)), compile=True)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for engine in (exact, compiled):
        leaf = x.clone().requires_grad_()
        engine.velocity(leaf, 300.0, class_labels=[1, 2]).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

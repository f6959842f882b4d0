"""The engine's door: what is wrong is named before the model runs and before any noise is drawn."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelflow_engine import BackendUnavailableError, Checkpoint, PixelFlowEngine
from pixelflow_engine.backends import backends
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.noise import CounterNoise, PublicNoise
from support.engines import tiny_engine

NAN, INF = math.nan, math.inf
HUGE = 10**400
"""An integer that no float holds."""

TEXT = torch.zeros(2, 3, 12)
NULL = torch.zeros(1, 3, 12)


@pytest.fixture(scope="module")
def engines() -> dict[str, PixelFlowEngine]:
    """One of each kind of model; three stages, 16 pixels, heights and widths in multiples of 8."""
    return {
        "classes": tiny_engine(),
        "text": tiny_engine(num_classes=0, cross_attention_dim=12),
        "both": tiny_engine(cross_attention_dim=12),
        "neither": tiny_engine(num_classes=0),
        "four channels": tiny_engine(in_channels=4, out_channels=4),
    }


HERE = (torch.device("cpu"), torch.float32)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done so far: calls of the model and draws of noise."""
    done: list[str] = []

    def watch(cls: type, method: str) -> None:
        original = getattr(cls, method)

        def watched(*args: object, **keywords: object) -> Tensor:
            done.append(f"{cls.__name__}.{method}")
            return original(*args, **keywords)

        monkeypatch.setattr(cls, method, watched)

    for source in (CounterNoise, PublicNoise):
        watch(source, "initial")
        watch(source, "enter")
    watch(PackedTransformer, "forward")
    return done


def shown(value: object) -> str:
    """A readable name of a parametrized value."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return ",".join(f"{key}={shown(v)}" for key, v in value.items())
    return str(value)[:24]


def assert_refused(call: Callable[[], object], name: str, said: str, work: list[str]) -> None:
    """The message begins with the argument's name, shows what came, and says what was expected; nothing happened."""
    stream = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^{name}\b") as caught:
        call()
    message = str(caught.value)
    assert said in message, f"does not show {said}: {message}"
    assert "expected" in message, f"does not say what was expected: {message}"
    assert work == [], f"refused too late, after {work}"
    assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"


# --- sampling ----------------------------------------------------------------------------------------------

BASE: dict[str, dict[str, Any]] = {
    "classes": {"class_labels": [1, 2]},
    "text": {"encoder_hidden_states": TEXT, "null_encoder_hidden_states": NULL},
    "both": {"class_labels": [1, 2], "encoder_hidden_states": TEXT, "null_encoder_hidden_states": NULL},
    "neither": {"guidance_scale": 1.0},
    "four channels": {"class_labels": [1, 2], "output_type": "pt"},
}

NOT_A_NUMBER: list[tuple[object, str]] = [
    (torch.tensor(True), "tensor(True)"), (torch.tensor(NAN), "tensor(nan)"), (torch.tensor(1j), "tensor(0.+1.j)"),
    (torch.ones(1), "tensor([1.])"), (torch.tensor(1.0, device="meta"), "meta"), (np.array(True), "array(True)"),
    (np.array("1"), "array('1'"), (np.ones(1), "array([1.])"),
]  # fmt: skip
NOT_POSITIVE = [
    (0, "0"), (0.0, "0.0"), (-1.0, "-1.0"), (NAN, "nan"), (INF, "inf"), (True, "True"), ("1", "'1'"), (None, "None"),
    (HUGE, "1000"), (np.True_, "True"), *NOT_A_NUMBER, (torch.tensor(0.0), "tensor(0.)"),
]  # fmt: skip

SINGLE_BAD_VALUES: dict[str, list[tuple[object, str]]] = {
    "class_labels": [
        (6, "6"), (-1, "-1"), (True, "True"), (1.0, "1.0"), ("3", "'3'"), (None, "None"), ([], "[]"), ((), "()"),
        ([0, 6], "6"), ([0, -1], "-1"), ([0, True], "True"), ([0, 1.0], "1.0"), ([0, None], "None"),
        ([[0], [1]], "[0]"),
        (torch.tensor([0.0, 1.0]), "torch.float32"), (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([[0, 1]]), "(1, 2)"), (torch.tensor([0, 6]), "6"), (torch.tensor([0, -1]), "-1"),
        (torch.tensor([], dtype=torch.int64), "[]"),
    ],
    "num_inference_steps": [
        (0, "0"), (-3, "-3"), (2.0, "2.0"), (True, "True"), ("10", "'10'"), (None, "None"),
        ([], "0 values"), ([1, 1], "2 values"), ([1, 1, 1, 1], "4 values"),
        ([1, 0, 1], "0"), ([1, 1, -1], "-1"), ([1, 1.5, 1], "1.5"), ([True, 1, 1], "True"),
        (2**64, str(2**64)), ([1, 10**7, 1], str(10**7)),
    ],
    "guidance_scale": [
        (NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (True, "True"), ("2", "'2'"), ([2.0], "[2.0]"),
        (HUGE, "1000"), *NOT_A_NUMBER,
    ],
    "guidance_schedule": [
        ("linear", "'linear'"), (2.0, "2.0"),
        ([], "0 weights"), ([1.0, 2.0], "2 weights"), ([1, 1, 1, 1], "4 weights"),
        ([1.0, NAN, 2.0], "nan"), ([1.0, INF, 2.0], "inf"), ([1.0, True, 2.0], "True"), ([1.0, "2", 2.0], "'2'"),
        (np.array([1.0, 2.0]), "got 2 weights, expected 3"),
    ],
    "solver": [("rk4", "'rk4'"), ("Euler", "'Euler'"), (None, "None"), (["euler"], "['euler']")],
    "noise": [("gaussian", "'gaussian'"), (None, "None")],
    "state": [("bf16", "'bf16'"), (torch.float32, "torch.float32")],
    "output_type": [("jpeg", "'jpeg'"), (None, "None")],
    "error_norm": [("max", "'max'"), (None, "None")],
    "height": [(0, "0"), (-16, "-16"), (12, "12"), (16.0, "16.0"), (True, "True"), ("16", "'16'"), (2**64, str(2**64))],
    "width": [(0, "0"), (-16, "-16"), (12, "12"), (16.0, "16.0"), (True, "True"), ("16", "'16'"), (2**20, str(2**20))],
    "callback_on_step_end": [("print", "'print'"), ([print], "[<built-in"), (0, "0")],
    "callback_on_stage_end": [("print", "'print'"), (True, "True")],
    "seed": [
        (-1, "-1"), (2**64, str(2**64)), (1.0, "1.0"), (True, "True"), ("1", "'1'"),
        ([], "0 seeds"), ([1], "1 seeds"), ([1, 2, 3], "3 seeds"),
        ([0, -1], "-1"), ([0, 2**64], str(2**64)), ([0, 1.5], "1.5"), ([0, True], "True"), ([0, None], "None"),
    ],
    "shift": NOT_POSITIVE,
    "rtol": NOT_POSITIVE,
    "atol": NOT_POSITIVE,
    # A model with classes takes no text.
    "encoder_hidden_states": [(TEXT, "(2, 3, 12)")],
    "null_encoder_hidden_states": [(TEXT, "(2, 3, 12)")],
    "encoder_attention_mask": [(torch.ones(2, 3), "(2, 3)")],
    "null_encoder_attention_mask": [(torch.ones(2, 3), "(2, 3)")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [(name, value, said) for name, values in SINGLE_BAD_VALUES.items() for value, said in values],
    ids=shown,
)
def test_a_bad_value_is_refused(
    name: str, value: object, said: str, engines: dict[str, PixelFlowEngine], work: list[str]
) -> None:
    assert_refused(lambda: engines["classes"](**(BASE["classes"] | {name: value})), name, said, work)


@pytest.mark.parametrize(
    ("kind", "arguments", "name", "said"),
    [
        # The published code's stream is one for the whole batch.
        ("classes", {"noise": "public", "seed": [0, 1]}, "seed", "[0, 1]"),
        ("classes", {"noise": "public", "seed": (0, 1)}, "seed", "(0, 1)"),
        ("classes", {"noise": "public", "seed": -1}, "seed", "-1"),
        ("classes", {"noise": "public", "seed": 2**64}, "seed", str(2**64)),
        ("classes", {"noise": "public", "seed": 1.5}, "seed", "1.5"),
        # Settings of a solver are checked whichever one runs.
        ("classes", {"solver": "dopri5", "shift": 0.0}, "shift", "0.0"),
        ("classes", {"solver": "dopri5", "num_inference_steps": 0}, "num_inference_steps", "0"),
        ("classes", {"solver": "euler", "rtol": 0.0}, "rtol", "0.0"),
        ("four channels", {"output_type": "pil"}, "output_type", "'pil'"),
        # Text.
        ("text", {"class_labels": [1, 2]}, "class_labels", "[1, 2]"),
        ("text", {"encoder_hidden_states": None}, "encoder_hidden_states", "None"),
        ("text", {"encoder_hidden_states": [[[0.0] * 12]]}, "encoder_hidden_states", "list"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 3, 8)}, "encoder_hidden_states", "(2, 3, 8)"),
        ("text", {"encoder_hidden_states": torch.zeros(3, 12)}, "encoder_hidden_states", "(3, 12)"),
        ("text", {"encoder_hidden_states": torch.zeros(0, 3, 12)}, "encoder_hidden_states", "(0, 3, 12)"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 0, 12)}, "encoder_hidden_states", "(2, 0, 12)"),
        ("text", {"encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask", "(2, 4)"),
        ("text", {"encoder_attention_mask": torch.ones(3)}, "encoder_attention_mask", "(3,)"),
        ("text", {"encoder_attention_mask": [[1, 1, 1]] * 2}, "encoder_attention_mask", "list"),
        ("text", {"encoder_attention_mask": torch.full((2, 3), 2)}, "encoder_attention_mask", "2"),
        ("text", {"encoder_attention_mask": torch.full((2, 3), NAN)}, "encoder_attention_mask", "nan"),
        ("text", {"encoder_attention_mask": torch.full((2, 3), 0.5)}, "encoder_attention_mask", "0.5"),
        ("text", {"null_encoder_hidden_states": None}, "null_encoder_hidden_states", "None"),
        ("text", {"null_encoder_hidden_states": torch.zeros(3, 3, 12)}, "null_encoder_hidden_states", "3"),
        ("text", {"null_encoder_hidden_states": torch.zeros(1, 3, 8)}, "null_encoder_hidden_states", "(1, 3, 8)"),
        ("text", {"null_encoder_attention_mask": torch.ones(2, 3)}, "null_encoder_attention_mask", "(2, 3)"),
        ("text", {"null_encoder_attention_mask": torch.full((1, 3), -1)}, "null_encoder_attention_mask", "-1"),
        ("text", {"seed": [0, 1, 2]}, "seed", "3 seeds"),
        ("both", {"class_labels": None}, "class_labels", "None"),
        ("both", {"class_labels": [1]}, "class_labels", "1"),
        ("both", {"class_labels": [1, 6]}, "class_labels", "6"),
        # Nothing to be conditioned on.
        ("neither", {"class_labels": [1]}, "class_labels", "[1]"),
        ("neither", {"class_labels": []}, "class_labels", "[]"),
        ("neither", {"guidance_scale": 1.5}, "guidance_scale", "1.5"),
        ("neither", {"guidance_scale": 0.0, "guidance_schedule": "constant"}, "guidance_scale", "0.0"),
        ("neither", {"guidance_schedule": [1.0, 1.0, 2.0]}, "guidance_", "2.0"),
        ("neither", {"encoder_hidden_states": TEXT}, "encoder_hidden_states", "(2, 3, 12)"),
        ("neither", {"seed": []}, "seed", ""),
        ("neither", {"noise": "public", "seed": [0]}, "seed", "[0]"),
    ],
    ids=shown,
)
def test_a_bad_combination_is_refused(
    kind: str,
    arguments: dict[str, Any],
    name: str,
    said: str,
    engines: dict[str, PixelFlowEngine],
    work: list[str],
) -> None:
    name = name if not name.endswith("_") else rf"{name}\w+"
    assert_refused(lambda: engines[kind](**(BASE[kind] | arguments)), name, said, work)


@pytest.mark.parametrize(
    ("kind", "arguments", "count"),
    [
        ("classes", {"class_labels": 5}, 1),
        ("classes", {"class_labels": range(6)}, 6),
        ("classes", {"class_labels": np.int64(3)}, 1),
        ("classes", {"height": np.int64(16), "width": np.uint8(8)}, 2),
        ("classes", {"class_labels": np.array([3, 5], dtype=np.uint8)}, 2),
        ("classes", {"class_labels": torch.tensor(3)}, 1),
        ("classes", {"seed": np.array([7, 2**63 + 5], dtype=np.uint64)}, 2),
        ("classes", {"seed": np.uint64(2**64 - 1)}, 2),
        ("classes", {"num_inference_steps": np.array([1, 2, 1])}, 2),
        ("classes", {"guidance_scale": np.float32(1.5)}, 2),
        ("classes", {"guidance_schedule": np.array([1.0, 1.5, 2.0])}, 2),
        ("classes", {"guidance_schedule": [1.0, torch.tensor(1.5), np.array(2)]}, 2),
        *(("classes", {name: torch.tensor(1.5)}, 2) for name in ("guidance_scale", "shift", "rtol", "atol")),
        *(("classes", {name: np.array(2)}, 2) for name in ("guidance_scale", "shift", "rtol", "atol")),
        ("classes", {"guidance_scale": torch.tensor(2.5, dtype=torch.bfloat16, requires_grad=True)}, 2),
        ("classes", {"class_labels": torch.tensor([0, 5], dtype=torch.uint8)}, 2),
        ("classes", {"num_inference_steps": (1, 2, 1)}, 2),
        ("classes", {"guidance_scale": -1, "guidance_schedule": "constant"}, 2),
        ("classes", {"guidance_schedule": [0, 1.0, -2.5]}, 2),
        ("classes", {"seed": 2**64 - 1}, 2),
        ("classes", {"seed": (2**64 - 1, 0)}, 2),
        ("classes", {"seed": None}, 2),
        ("classes", {"noise": "public", "seed": 2**64 - 1}, 2),
        ("classes", {"height": 8, "width": 24}, 2),
        ("classes", {"shift": 3}, 2),
        ("text", {}, 2),
        ("text", {"encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, 2),
        ("text", {"null_encoder_hidden_states": None, "guidance_scale": 1.0}, 2),
        ("both", {}, 2),
        ("neither", {"seed": [3, 1, 2]}, 3),
        ("neither", {}, 1),
        ("four channels", {}, 2),
    ],
    ids=shown,
)
def test_what_is_right_is_not_refused(
    kind: str, arguments: dict[str, Any], count: int, engines: dict[str, PixelFlowEngine], work: list[str]
) -> None:
    request = {"num_inference_steps": 1, "output_type": "pt"} | BASE[kind] | arguments
    images = engines[kind](**request).images
    assert isinstance(images, Tensor)
    assert images.shape[0] == count
    source = "PublicNoise" if arguments.get("noise") == "public" else "CounterNoise"
    assert {"PackedTransformer.forward", f"{source}.initial", f"{source}.enter"} == set(work), "the spy sees nothing"


@pytest.mark.parametrize(
    ("seed", "seeds"), [(5, (5, 6)), (2**64 - 1, (2**64 - 1, 0)), ([9, 3], (9, 3)), ((2**64 - 1, 0), (2**64 - 1, 0))]
)
def test_seeds_count_up_and_wrap(seed: Any, seeds: tuple[int, ...], engines: dict[str, PixelFlowEngine]) -> None:
    assert engines["classes"]([1, 2], num_inference_steps=1, seed=seed).seeds == seeds


# --- velocity ----------------------------------------------------------------------------------------------

VELOCITY_BASE: dict[str, dict[str, Any]] = {
    "classes": {"x": torch.zeros(2, 3, 8, 8), "t_model": 5.0, "class_labels": [1, 2]},
    "text": {"x": torch.zeros(2, 3, 8, 8), "t_model": 5.0, "encoder_hidden_states": TEXT},
    "neither": {"x": torch.zeros(2, 3, 8, 8), "t_model": 5.0},
}


@pytest.mark.parametrize(
    ("kind", "arguments", "name", "said"),
    [
        ("classes", {"x": None}, "x", "None"),
        ("classes", {"x": np.zeros((2, 3, 8, 8))}, "x", "ndarray"),
        ("classes", {"x": torch.zeros(3, 8, 8)}, "x", "(3, 8, 8)"),
        ("classes", {"x": torch.zeros(2, 1, 8, 8)}, "x", "(2, 1, 8, 8)"),
        ("classes", {"x": torch.zeros(2, 8, 8, 3)}, "x", "(2, 8, 8, 3)"),
        ("classes", {"x": torch.zeros(2, 3, 7, 8)}, "x", "(2, 3, 7, 8)"),
        ("classes", {"x": torch.zeros(2, 3, 8, 5)}, "x", "(2, 3, 8, 5)"),
        ("classes", {"x": torch.zeros(2, 3, 8, 0)}, "x", "(2, 3, 8, 0)"),
        ("classes", {"x": torch.zeros(0, 3, 8, 8)}, "x", "(0, 3, 8, 8)"),
        ("classes", {"x": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "x", "torch.uint8"),
        ("classes", {"t_model": NAN}, "t_model", "nan"),
        ("classes", {"t_model": INF}, "t_model", "inf"),
        ("classes", {"t_model": torch.tensor([5.0, NAN])}, "t_model", "nan"),
        ("classes", {"t_model": torch.tensor([1.0, 2.0, 3.0])}, "t_model", "(3,)"),
        ("classes", {"t_model": torch.zeros(2, 1)}, "t_model", "(2, 1)"),
        ("classes", {"t_model": []}, "t_model", "(0,)"),
        ("classes", {"t_model": "5"}, "t_model", "5"),
        ("classes", {"t_model": None}, "t_model", "None"),
        ("classes", {"latent_size": NAN}, "latent_size", "nan"),
        ("classes", {"latent_size": 2.5}, "latent_size", "2.5"),
        ("classes", {"latent_size": 0}, "latent_size", "0"),
        ("classes", {"latent_size": -4}, "latent_size", "-4"),
        ("classes", {"latent_size": torch.tensor([4, 4, 4])}, "latent_size", "(3,)"),
        ("classes", {"class_labels": None}, "class_labels", "None"),
        ("classes", {"class_labels": [1]}, "class_labels", "1"),
        ("classes", {"class_labels": [1, 2, 3]}, "class_labels", "3"),
        ("classes", {"class_labels": [1, 6]}, "class_labels", "6"),
        ("classes", {"class_labels": torch.tensor([1.0, 2.0])}, "class_labels", "torch.float32"),
        ("classes", {"encoder_hidden_states": TEXT}, "encoder_hidden_states", "(2, 3, 12)"),
        ("classes", {"encoder_attention_mask": torch.ones(2, 3)}, "encoder_attention_mask", "(2, 3)"),
        ("text", {"encoder_hidden_states": None}, "encoder_hidden_states", "None"),
        ("text", {"encoder_hidden_states": torch.zeros(3, 3, 12)}, "encoder_hidden_states", "3"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 3, 8)}, "encoder_hidden_states", "(2, 3, 8)"),
        ("text", {"encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask", "(2, 4)"),
        ("text", {"class_labels": [1, 2]}, "class_labels", "[1, 2]"),
        ("neither", {"class_labels": [1, 2]}, "class_labels", "[1, 2]"),
        ("neither", {"encoder_hidden_states": TEXT}, "encoder_hidden_states", "(2, 3, 12)"),
    ],
    ids=shown,
)
def test_velocity_refuses(
    kind: str,
    arguments: dict[str, Any],
    name: str,
    said: str,
    engines: dict[str, PixelFlowEngine],
    work: list[str],
) -> None:
    assert_refused(lambda: engines[kind].velocity(**(VELOCITY_BASE[kind] | arguments)), name, said, work)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("classes", {"t_model": torch.tensor([0.0, 999.0])}),
        ("classes", {"t_model": 7}),
        ("classes", {"latent_size": 4}),
        ("classes", {"latent_size": torch.tensor([4, 8])}),
        ("classes", {"x": torch.zeros(2, 3, 2, 10, dtype=torch.float64)}),
        ("text", {"encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool)}),
        ("neither", {}),
    ],
    ids=shown,
)
def test_velocity_takes(
    kind: str, arguments: dict[str, Any], engines: dict[str, PixelFlowEngine], work: list[str]
) -> None:
    request = VELOCITY_BASE[kind] | arguments
    velocity = engines[kind].velocity(**request)
    assert velocity.shape == request["x"].shape
    assert velocity.dtype == request["x"].dtype
    assert work == ["PackedTransformer.forward"]


# --- making an engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "Torch", "", None, 3])
def test_an_unknown_backend_is_refused(
    backend: Any, engines: dict[str, PixelFlowEngine], work: list[str], tmp_path: Path
) -> None:
    engine = engines["classes"]
    checkpoint = Checkpoint(engine.config, dict(engine.model.state_dict()), "memory")
    assert_refused(lambda: PixelFlowEngine(engine.config, engine.model, backend), "backend", repr(backend), work)
    assert_refused(lambda: PixelFlowEngine.from_checkpoint(checkpoint, backend=backend), "backend", repr(backend), work)
    nowhere = tmp_path / "nothing here"  # the name is refused before any file is looked for
    assert_refused(lambda: PixelFlowEngine.from_pretrained(nowhere, backend=backend), "backend", repr(backend), work)


@pytest.mark.parametrize("graphs", [0, 1, 1.0, None, "on"], ids=repr)
def test_graphs_are_true_false_or_auto(graphs: Any, engines: dict[str, PixelFlowEngine], work: list[str]) -> None:
    """0 and 1 are equal to False and True, but would not mean the same."""
    engine = engines["classes"]
    assert_refused(lambda: PixelFlowEngine(engine.config, engine.model, graphs=graphs), "graphs", repr(graphs), work)


@pytest.mark.parametrize("backend", [b for b in backends(*HERE) if not b.available], ids=lambda b: str(b.name))
def test_a_backend_that_cannot_run_is_not_replaced(backend: Any, engines: dict[str, PixelFlowEngine]) -> None:
    engine = engines["classes"]
    with pytest.raises(BackendUnavailableError) as caught:
        PixelFlowEngine(engine.config, engine.model, backend.name)
    assert backend.name in str(caught.value)
    assert backend.reason in str(caught.value)


def test_the_chosen_backend_can_run(engines: dict[str, PixelFlowEngine]) -> None:
    available = {b.name for b in backends(*HERE) if b.available}
    assert "torch" in available
    for name in ("auto", *available):
        engine = PixelFlowEngine(engines["classes"].config, engines["classes"].model, name)
        assert engine.backend.available
        assert engine.backend.name in available


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float32", None], ids=str)
def test_a_wrong_dtype_is_refused(dtype: Any, engines: dict[str, PixelFlowEngine], work: list[str]) -> None:
    engine = engines["classes"]
    checkpoint = Checkpoint(engine.config, dict(engine.model.state_dict()), "memory")
    assert_refused(lambda: PixelFlowEngine.from_checkpoint(checkpoint, dtype=dtype), "dtype", str(dtype), work)


@pytest.mark.parametrize("dtype", ["float32", torch.int64, None])
def test_a_dtype_is_refused_before_a_file_is_read(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^dtype: got {dtype!r}, expected torch\.float32"):
        PixelFlowEngine.from_pretrained(tmp_path / "nothing here", dtype=dtype)


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "cpu:x", "", "hpu", "meta"])
def test_a_device_that_is_not_there_is_refused(
    device: str, engines: dict[str, PixelFlowEngine], work: list[str], tmp_path: Path
) -> None:
    engine = engines["classes"]
    checkpoint = Checkpoint(engine.config, dict(engine.model.state_dict()), "memory")
    assert_refused(lambda: PixelFlowEngine.from_checkpoint(checkpoint, device), "device", repr(device), work)
    nowhere = tmp_path / "nothing here"  # the device is refused before any file is looked for
    assert_refused(lambda: PixelFlowEngine.from_pretrained(nowhere, device), "device", repr(device), work)


@pytest.mark.parametrize("value", [None, 1, "auto", 0.5], ids=shown)
def test_compile_is_true_or_false(value: Any, engines: dict[str, PixelFlowEngine], work: list[str]) -> None:
    engine = engines["classes"]
    assert_refused(lambda: PixelFlowEngine(engine.config, engine.model, compile=value), "compile", repr(value), work)


# --- loading, warming up, streaming, copying ---------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 3, "", b"digits", ["digits"]], ids=shown)
def test_a_checkpoint_is_a_path_or_a_name(value: Any, work: list[str]) -> None:
    assert_refused(lambda: PixelFlowEngine.from_pretrained(value), "checkpoint", repr(value), work)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "None"), (4, "4"), ("", "''"), ([1, 0], "0"), ([2, 1.5], "1.5"), ([True], "True")],
    ids=shown,
)
def test_sizes_to_warm_up_are_checked_before_any_runs(
    value: Any, said: str, engines: dict[str, PixelFlowEngine], work: list[str]
) -> None:
    assert_refused(lambda: engines["classes"].warmup(value), "batch_sizes", said, work)


def test_a_stream_names_an_option_that_it_has_not(engines: dict[str, PixelFlowEngine], work: list[str]) -> None:
    with pytest.raises(TypeError, match=r"^stream\(\) got an unexpected keyword argument 'num_steps'$"):
        engines["classes"].stream([1], num_steps=3)
    assert work == []


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_says_that_it_cannot_be_copied(
    duplicate: Callable[[object], object], engines: dict[str, PixelFlowEngine]
) -> None:
    with pytest.raises(TypeError, match="from_pretrained, in the process that uses it"):
        duplicate(engines["classes"])

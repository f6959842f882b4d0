"""Checkpoints: what is written is what is read, in every form, and a failed write changes nothing."""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import os
import random
import secrets
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from pixelflow_engine.checkpoint import Checkpoint, convert, load_checkpoint, native, public, save_checkpoint
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError
from pixelflow_engine.reference import PixelFlowTransformer

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Weights = dict[str, Tensor]


def tiny_config(**model: Any) -> PixelFlowConfig:
    shape = {"num_attention_heads": 1, "attention_head_dim": 4, "depth": 1, "patch_size": 2, "num_classes": 3} | model
    return PixelFlowConfig(model=ModelConfig(**shape), scheduler=SchedulerConfig(num_stages=2), resolution=16)


def drawn_config() -> PixelFlowConfig:
    """A small configuration, another one in every run."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    model = ModelConfig(
        num_attention_heads=draw.randint(1, 3),
        attention_head_dim=draw.choice([4, 8, 12]),
        depth=draw.randint(1, 3),
        in_channels=(channels := draw.randint(1, 4)),
        out_channels=channels,
        patch_size=draw.choice([1, 2, 4]),
        num_classes=draw.choice([0, 1, 10]),
        attention_bias=draw.random() < 0.5,
        cross_attention_dim=draw.choice([None, 1, 24]),
        dropout=draw.choice([0.0, 1e-5, draw.random()]),
    )
    scheduler = SchedulerConfig(num_train_timesteps=draw.randint(2, 2000), num_stages=draw.randint(1, 4))
    side = model.patch_size * 2 ** (scheduler.num_stages - 1)
    return PixelFlowConfig(model=model, scheduler=scheduler, resolution=side * draw.randint(1, 9))


def random_weights(config: PixelFlowConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    """Normals, and in the first tensor values whose bits are easily lost: signed zeros and denormals."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(config.model)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    delicate = torch.tensor([-0.0, 0.0, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max], dtype=dtype)
    next(iter(weights.values())).view(-1)[:4] = delicate[: next(iter(weights.values())).numel()]
    return weights


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def digests(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Everything that a tensor is, comparable: unlike with ==, -0.0 is not 0.0."""
    return {name: (tensor.dtype, tuple(tensor.shape), bits(tensor)) for name, tensor in weights.items()}


def assert_same(got: Checkpoint, config: PixelFlowConfig, weights: Mapping[str, Tensor]) -> None:
    assert got.config == config
    assert list(got.state_dict) == list(parameter_shapes(config.model)), "not in the published order"
    assert digests(got.state_dict) == digests(weights)
    for name, tensor in got.state_dict.items():
        assert type(tensor) is Tensor, name
        assert tensor.is_contiguous(), name
        assert not tensor.requires_grad, name


def write_training_checkpoint(path: Path, config: PixelFlowConfig, model: Weights, ema: Weights | None) -> None:
    """What a training run leaves: parameters that took an optimizer step, and the command line as a Namespace."""
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in model.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = OrderedDict(model)
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as nn.Module writes it
    content: dict[str, Any] = {"model": state, "opt": optimizer.state_dict()}
    content["args"] = argparse.Namespace(lr=1e-4, name="run", resume=None, sizes=[1, 2], pair=(1.0, True), many=2**40)
    if ema is not None:
        content["ema"] = {name: torch.nn.Parameter(tensor) for name, tensor in ema.items()}
    torch.save(content, path)
    write_public_config(path.with_name("config.yaml"), config)


def write_public_config(path: Path, config: PixelFlowConfig) -> None:
    """A config.yaml as training runs have it, with every section."""
    params = {key: value for key, value in config.to_dict()["model"].items() if value is not None}
    content = {
        "model": {"target": "pixelflow.model.PixelFlowModel", "params": params},
        "scheduler": config.to_dict()["scheduler"] | {"pyramid_shift": False},
        "train": {"lr": 1e-4, "anything": ["goes", {"here": None}]},
        "data": {
            "root": "images", "center_crop": False, "resolution": config.resolution, "expand_ratio": 1.125,
            "num_workers": 12, "batch_size": 16,
        },
        "seed": 42,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    config = drawn_config()
    weights = random_weights(config, dtype=dtype)
    save_checkpoint(tmp_path / "a", config, weights)
    got = load_checkpoint(tmp_path / "a")
    assert_same(got, config, weights)
    assert got.source == str(tmp_path / "a")


def test_types_may_be_mixed(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    weights = {name: tensor.to(DTYPES[i % 4]) for i, (name, tensor) in enumerate(weights.items())}
    save_checkpoint(tmp_path / "a", config, weights)
    assert_same(load_checkpoint(str(tmp_path / "a")), config, weights)
    assert_same(convert(tmp_path / "a", tmp_path / "b", to="public"), config, weights)


def test_order_and_gradients_are_not_part_of_it(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    shuffled = {name: torch.nn.Parameter(tensor) for name, tensor in reversed(weights.items())}
    save_checkpoint(tmp_path / "a", config, weights)
    save_checkpoint(tmp_path / "b", config, shuffled)
    assert_same(load_checkpoint(tmp_path / "b"), config, weights)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), "same model, other bytes"


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    config = drawn_config()
    weights = random_weights(config, dtype=dtype)
    (tmp_path / "public").mkdir()
    write_public_config(tmp_path / "public" / "config.yaml", config)
    torch.save(weights, tmp_path / "public" / "model.pt")

    assert_same(load_checkpoint(tmp_path / "public"), config, weights)
    assert_same(convert(tmp_path / "public", tmp_path / "ours"), config, weights)
    back = convert(tmp_path / "ours", tmp_path / "back", to="public")
    assert_same(back, config, weights)
    assert back.source == str(tmp_path / "back")
    assert_same(convert(tmp_path / "back", tmp_path / "again"), config, weights)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_public_files_are_what_public_code_reads(tmp_path: Path) -> None:
    config = tiny_config(cross_attention_dim=6, dropout=1e-5)
    weights = random_weights(config)
    save_checkpoint(tmp_path / "a", config, weights)
    convert(tmp_path / "a", tmp_path / "b", to="public")
    content = torch.load(tmp_path / "b" / "model.pt", weights_only=True)
    assert type(content) is dict
    assert digests(content) == digests(weights)
    written = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert written["model"]["target"] == "pixelflow.model.PixelFlowModel"
    assert written["model"]["params"] == {
        "num_attention_heads": 1, "attention_head_dim": 4, "depth": 1, "in_channels": 3, "out_channels": 3,
        "patch_size": 2, "num_classes": 3, "attention_bias": True, "cross_attention_dim": 6, "dropout": 1e-5,
    }  # fmt: skip
    assert written["scheduler"] == {"num_train_timesteps": 1000, "num_stages": 2}
    assert written["data"] == {"resolution": 16}


def test_strides_of_a_public_file_are_not_kept(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    columns_first = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in weights.items()}
    write_public_config(tmp_path / "config.yaml", config)
    torch.save(columns_first, tmp_path / "model.pt")
    assert_same(load_checkpoint(tmp_path), config, weights)


@pytest.mark.parametrize("form", ["safetensors", "public"])
def test_tensors_that_share_memory(tmp_path: Path, form: Any) -> None:
    config = tiny_config()
    weights = random_weights(config)
    shapes = parameter_shapes(config.model)
    pool = torch.randn(100_000)
    equal = [name for name in weights if name.endswith("_proj.bias")]
    weights |= dict.fromkeys(equal, pool[100:104])
    weights["proj_out_1.weight"] = pool[200:232].view(shapes["proj_out_1.weight"])
    save_checkpoint(tmp_path / "a", config, weights)
    assert_same(convert(tmp_path / "a", tmp_path / "b", to=form), config, weights)
    size = sum(file.stat().st_size for file in (tmp_path / "b").iterdir())
    assert size < pool.nbytes, "the whole pool was written for a few of its values"


def test_shared_memory_in_a_public_file_is_written_once_per_tensor(tmp_path: Path) -> None:
    """A converter hands loaded tensors over, which never share; the writer must not rely on it."""
    config = tiny_config()
    weights = random_weights(config)
    pool = torch.randn(100_000)
    weights |= {name: pool[100:104] for name in weights if name.endswith("_proj.bias")}
    weights["timestep_embedder.linear_2.weight"] = weights["latent_size_embedder.linear_2.weight"]
    public.write_public(tmp_path, config, weights)
    assert (tmp_path / "model.pt").stat().st_size < pool.nbytes
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == len(weights)
    assert_same(load_checkpoint(tmp_path), config, weights)


@pytest.mark.parametrize("num_classes", [0, 1, 10, 100])
def test_the_safetensors_package_reads_our_file(tmp_path: Path, num_classes: int) -> None:
    config = tiny_config(num_classes=num_classes, patch_size=1, in_channels=1, out_channels=1)
    weights = {name: t.to(DTYPES[i % 4]) for i, (name, t) in enumerate(random_weights(config).items())}
    save_checkpoint(tmp_path / "a", config, weights)
    assert digests(safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")) == digests(weights)
    header, start = read_header(tmp_path / "a" / "model.safetensors")
    assert start % 8 == 0
    for name, tensor in weights.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, f"{name} is not aligned"


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:start])
    return header, start


def test_digests_are_what_the_documentation_says(tmp_path: Path) -> None:
    config = tiny_config()
    save_checkpoint(tmp_path / "a", config, random_weights(config, dtype=torch.bfloat16))
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    header, start = read_header(tmp_path / "a" / "model.safetensors")
    metadata = header.pop("__metadata__")
    config_bytes = (tmp_path / "a" / "config.json").read_bytes()
    assert metadata.pop("sha256.config.json") == hashlib.sha256(config_bytes).hexdigest()
    assert metadata.pop("format") == "pt"
    assert metadata.pop("pixelflow_engine.checkpoint") == "1"
    expected = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        text = f"{entry['dtype']} {entry['shape']}\n".encode()
        expected[f"sha256.{name}"] = hashlib.sha256(text + data[begin:end]).hexdigest()
    assert metadata == expected


@pytest.mark.parametrize("cross_attention_dim", [None, 6])
def test_the_reference_model_loads_it_strictly(tmp_path: Path, cross_attention_dim: int | None) -> None:
    config = tiny_config(cross_attention_dim=cross_attention_dim, depth=2)
    model = PixelFlowTransformer(
        depth=2,
        num_attention_heads=1,
        attention_head_dim=4,
        in_channels=3,
        out_channels=3,
        patch_size=2,
        num_classes=3,
        attention_bias=True,
        cross_attention_dim=cross_attention_dim,
    )
    save_checkpoint(tmp_path / "a", config, model.state_dict())
    other = random_weights(config)
    save_checkpoint(tmp_path / "b", config, other)
    model.load_state_dict(load_checkpoint(tmp_path / "b").state_dict, strict=True)
    assert digests(model.state_dict()) == digests(other)


@pytest.mark.parametrize("form", ["safetensors", "public"])
def test_what_was_loaded_no_longer_depends_on_the_file(tmp_path: Path, form: Any) -> None:
    config = tiny_config()
    weights = random_weights(config)
    save_checkpoint(tmp_path / "a", config, weights)
    got = convert(tmp_path / "a", tmp_path / "b", to=form)
    for file in (tmp_path / "b").iterdir():
        with file.open("r+b") as opened:  # in place, so that a mapping of the file would see it
            opened.write(b"\xff" * file.stat().st_size)
    assert_same(got, config, weights)


# --- training checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "expected"), [("auto", "ema"), ("ema", "ema"), ("model", "model")])
@pytest.mark.parametrize("name", ["model_1000.pt", "model.pt"])
def test_training_checkpoint(tmp_path: Path, choice: Any, expected: str, name: str) -> None:
    config = drawn_config()
    sets = {"model": random_weights(config, 1), "ema": random_weights(config, 2)}
    write_training_checkpoint(tmp_path / name, config, sets["model"], sets["ema"])
    got = load_checkpoint(tmp_path / name, weights=choice)
    assert_same(got, config, sets[expected])
    assert got.source == str(tmp_path / name)
    assert_same(convert(tmp_path / name, tmp_path / "b", weights=choice), config, sets[expected])
    if name == "model.pt":
        assert_same(load_checkpoint(tmp_path, weights=choice), config, sets[expected])


def test_the_only_training_checkpoint_of_a_folder_needs_no_name(tmp_path: Path) -> None:
    config = tiny_config()
    weights = {step: random_weights(config, step) for step in (1, 2)}
    write_training_checkpoint(tmp_path / "model_1.pt", config, weights[1], None)
    assert_same(load_checkpoint(tmp_path), config, weights[1])
    write_training_checkpoint(tmp_path / "model_2.pt", config, weights[2], None)
    with pytest.raises(CheckpointError, match=r"holds model_1\.pt, model_2\.pt, expected the path of one of them"):
        load_checkpoint(tmp_path)
    write_training_checkpoint(tmp_path / "model.pt", config, weights[2], None)
    assert_same(load_checkpoint(tmp_path), config, weights[2])


@pytest.mark.parametrize("callers", [[], [argparse.Namespace]])
def test_what_torch_allows_elsewhere_stays_as_it_was(tmp_path: Path, callers: list[Any]) -> None:
    config = tiny_config()
    write_training_checkpoint(tmp_path / "model_1.pt", config, random_weights(config), None)
    with torch.serialization.safe_globals(callers):
        before = set(torch.serialization.get_safe_globals())
        assert (argparse.Namespace in before) == bool(callers), "an earlier load left it allowed"
        load_checkpoint(tmp_path / "model_1.pt")
        assert set(torch.serialization.get_safe_globals()) == before


def test_training_checkpoint_without_average(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    write_training_checkpoint(tmp_path / "model_1.pt", config, weights, None)
    assert_same(load_checkpoint(tmp_path / "model_1.pt"), config, weights)
    with pytest.raises(CheckpointError, match=r"model_1\.pt: a training checkpoint without the key ema"):
        load_checkpoint(tmp_path / "model_1.pt", weights="ema")


@pytest.mark.parametrize("choice", ["ema", "model"])
@pytest.mark.parametrize("form", ["safetensors", "public"])
def test_no_choice_where_there_is_none(tmp_path: Path, choice: Any, form: Any) -> None:
    config = tiny_config()
    save_checkpoint(tmp_path / "a", config, random_weights(config))
    convert(tmp_path / "a", tmp_path / "b", to=form)
    with pytest.raises(CheckpointError, match=f"asked for '{choice}' weights"):
        load_checkpoint(tmp_path / "b", weights=choice)


# --- finding ------------------------------------------------------------------------------------------------


def test_bundled_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    bundled, local = random_weights(config, 1), random_weights(config, 2)
    (tmp_path / "package" / "assets" / "nothing").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    save_checkpoint(tmp_path / "package" / "assets" / "digits", config, bundled)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path / "package")
    monkeypatch.chdir(tmp_path / "here")

    got = load_checkpoint("digits")
    assert_same(got, config, bundled)
    assert got.source == str(tmp_path / "package" / "assets" / "digits")
    with pytest.raises(CheckpointError, match=r"letters: no such file or folder.*bundled are: digits$"):
        load_checkpoint("letters")
    for name in ("nothing", "../assets/digits", str(tmp_path / "digits"), "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError):
            load_checkpoint(name)
    save_checkpoint("digits", config, local)
    assert_same(load_checkpoint("digits"), config, local)


def test_which_form_a_folder_has(tmp_path: Path) -> None:
    config = tiny_config()
    ours, public = random_weights(config, 1), random_weights(config, 2)
    save_checkpoint(tmp_path / "a", config, public)
    convert(tmp_path / "a", tmp_path / "b", to="public")
    (tmp_path / "b" / "config.json").write_text("{}")  # somebody else's, of another meaning
    assert_same(load_checkpoint(tmp_path / "b"), config, public)
    save_checkpoint(tmp_path / "c", config, ours)
    for file in (tmp_path / "c").iterdir():
        file.rename(tmp_path / "b" / file.name)
    assert_same(load_checkpoint(tmp_path / "b"), config, ours)


def test_links_are_followed(tmp_path: Path) -> None:
    config = tiny_config()
    first, second = random_weights(config, 1), random_weights(config, 2)
    (tmp_path / "elsewhere").mkdir()
    save_checkpoint(tmp_path / "elsewhere" / "a", config, first)
    (tmp_path / "latest").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "files").mkdir()
    for file in (tmp_path / "elsewhere" / "a").iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    assert_same(load_checkpoint(tmp_path / "files"), config, first)
    save_checkpoint(tmp_path / "latest", config, second, overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert_same(load_checkpoint(tmp_path / "elsewhere" / "a"), config, second)


@pytest.mark.parametrize("call", ["load", "convert weights", "convert to"])
def test_unknown_options(tmp_path: Path, call: str) -> None:
    config = tiny_config()
    save_checkpoint(tmp_path / "a", config, random_weights(config))
    options: Any = {"to": "pickle"} if call == "convert to" else {"weights": "best"}
    targets = [] if call == "load" else [tmp_path / "b"]
    function: Any = load_checkpoint if call == "load" else convert
    with pytest.raises(CheckpointError, match=r"got '(best|pickle)', expected one of"):
        function(tmp_path / "a", *targets, **options)
    assert not (tmp_path / "b").exists()


# --- what may be saved --------------------------------------------------------------------------------------


def without(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != "proj_out_2.bias"}


def changed(change: Callable[[Tensor], Any]) -> Callable[[Weights], Any]:
    return lambda weights: weights | {"proj_out_2.weight": change(weights["proj_out_2.weight"])}


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "missing proj_out_2.bias"),
        (lambda weights: weights | {"more": torch.zeros(1)}, "not part of the model: more"),
        (changed(lambda t: t.T), r"got shape \[4, 12\], expected \[12, 4\]"),
        (changed(lambda t: t.T.contiguous().T), "expected a contiguous tensor"),
        (changed(lambda t: t[:, :1].expand(t.shape)), "expected a contiguous tensor"),
        (changed(lambda t: t.long()), "got type torch.int64"),
        (changed(lambda t: t.to(torch.complex64)), "got type torch.complex64"),
        (changed(lambda t: t.to(torch.float8_e4m3fn)), "got type torch.float8_e4m3fn"),
        (changed(lambda t: t.to("meta")), "expected a dense tensor on cpu"),
        (changed(lambda t: t.to_sparse()), "expected a dense tensor on cpu"),
        (changed(lambda t: torch._neg_view(t)), "expected a dense tensor on cpu"),
        (changed(lambda t: t.tolist()), "got a list, expected a tensor"),
        (changed(with_value(float("nan"))), "1 of 48 values are not finite"),
        (changed(with_value(float("-inf"))), "1 of 48 values are not finite"),
        (lambda weights: list(weights.items()), "expected a dict of tensors"),
        (lambda weights: dict(enumerate(weights.values())), "name is a int"),
    ],
)
def test_only_loadable_weights_are_saved(tmp_path: Path, change: Callable[[Weights], Any], message: str) -> None:
    config = tiny_config()
    with pytest.raises(CheckpointError, match=message) as info:
        save_checkpoint(tmp_path / "a", config, change(random_weights(config)))
    assert str(tmp_path / "a") in str(info.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_value_must_be_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    config = tiny_config()
    for name, tensor in random_weights(config, dtype=dtype).items():
        for position in {0, 1, tensor.numel() // 2, tensor.numel() - 1}:
            bad = tensor.clone()
            bad.view(-1)[position] = value
            with pytest.raises(CheckpointError, match=f"{name}: 1 of {tensor.numel()} values are not finite"):
                save_checkpoint(tmp_path / "a", config, random_weights(config, dtype=dtype) | {name: bad})


def test_only_a_config_is_saved(tmp_path: Path) -> None:
    config: Any = tiny_config()
    with pytest.raises(CheckpointError, match="expected a PixelFlowConfig"):
        save_checkpoint(tmp_path / "a", config.model, random_weights(config))


# --- where it may be saved ----------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    config = tiny_config()
    old, new = random_weights(config, 1), random_weights(config, 2)
    save_checkpoint(tmp_path / "a", config, old)
    for write in (
        lambda: save_checkpoint(tmp_path / "a", config, new),
        lambda: convert(tmp_path / "a", tmp_path / "a", to="public"),
    ):
        with pytest.raises(CheckpointError, match=r"a: exists already; pass overwrite"):
            write()
        assert_same(load_checkpoint(tmp_path / "a"), config, old)
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_overwrite(tmp_path: Path) -> None:
    config, other = tiny_config(), tiny_config(depth=2)
    save_checkpoint(tmp_path / "a", config, random_weights(config))
    save_checkpoint(tmp_path / "a", other, random_weights(other), overwrite=True)
    assert_same(load_checkpoint(tmp_path / "a"), other, random_weights(other))
    # In place, from one form into the other: nothing of the first stays.
    assert_same(convert(tmp_path / "a", tmp_path / "a", to="public", overwrite=True), other, random_weights(other))
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["config.yaml", "model.pt"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    save_checkpoint(tmp_path / "new", config, random_weights(config), overwrite=True)  # nothing there: no matter


def test_overwrite_deletes_nothing_but_checkpoints(tmp_path: Path) -> None:
    config = tiny_config()
    weights = random_weights(config)
    write_training_checkpoint_folder = tmp_path / "run"
    write_training_checkpoint_folder.mkdir()
    write_training_checkpoint(write_training_checkpoint_folder / "model_1000.pt", config, weights, weights)
    with pytest.raises(CheckpointError, match=r"run: not replaced, because it also holds model_1000\.pt"):
        save_checkpoint(tmp_path / "run", config, weights, overwrite=True)
    (tmp_path / "odd" / "model.pt").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"odd: not replaced, because it also holds model\.pt"):
        save_checkpoint(tmp_path / "odd", config, weights, overwrite=True)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="file: is a file"):
        save_checkpoint(tmp_path / "file", config, weights, overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        save_checkpoint(tmp_path / "nowhere" / "a", config, weights)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "odd", "run"]


# --- crashes ------------------------------------------------------------------------------------------------


class Faults:
    """Counts the calls that a write makes of the file system, and lets some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool] = lambda call: False) -> None:
        self.events: list[tuple[str, str]] = []
        self.fails = fails
        for name in ("rename", "replace", "fsync"):
            monkeypatch.setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *rest: Any, **options: Any) -> Any:
            path = Path(f"/proc/self/fd/{target}").readlink() if name == "fsync" else Path(target)
            self.events.append((name, path.name))
            if self.fails(len(self.events) - 1):
                raise OSError(5, "Input/output error")
            return original(target, *rest, **options)

        return call


def save_ours(path: Path, config: PixelFlowConfig, weights: Weights, overwrite: bool) -> None:
    save_checkpoint(path, config, weights, overwrite=overwrite)


def convert_to_public(path: Path, config: PixelFlowConfig, weights: Weights, overwrite: bool) -> None:
    save_checkpoint(path.with_name("source"), config, weights)
    convert(path.with_name("source"), path, to="public", overwrite=overwrite)


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    faults = Faults(monkeypatch)
    save_ours(tmp_path / "a", config, random_weights(config), False)
    temporary = faults.events[2][1]
    assert temporary.startswith(".a.")
    fresh = [("fsync", "config.json"), ("fsync", "model.safetensors"), ("fsync", temporary), ("rename", temporary)]
    assert faults.events == [*fresh, ("fsync", tmp_path.name)]
    faults.events.clear()
    save_ours(tmp_path / "a", config, random_weights(config), True)
    assert [name for name, _ in faults.events] == ["fsync", "fsync", "fsync", "rename", "rename", "fsync"]
    assert faults.events[3] == ("rename", "a")


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_call_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, call: int
) -> None:
    config = tiny_config()
    old, new = random_weights(config, 1), random_weights(config, 2)
    if exists:
        save_ours(tmp_path / "a", config, old, False)
    with monkeypatch.context() as patch:
        faults = Faults(patch, fails=lambda number: number == call)
        if not exists and call == 5:  # a new folder takes five calls
            save_ours(tmp_path / "a", config, new, True)
            assert len(faults.events) == 5
            return
        with pytest.raises(CheckpointError, match=r"a: Input/output error"):
            save_ours(tmp_path / "a", config, new, True)
        assert len(faults.events) > call
    assert [entry.name for entry in tmp_path.iterdir()] == (["a"] if exists else [])
    if exists:
        assert_same(load_checkpoint(tmp_path / "a"), config, old)
        save_ours(tmp_path / "a", config, new, True)
        assert_same(load_checkpoint(tmp_path / "a"), config, new)


@pytest.mark.parametrize("call", range(6))
def test_a_failed_conversion_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    config = tiny_config()
    old, new = random_weights(config, 1), random_weights(config, 2)
    save_ours(tmp_path / "a", config, old, False)
    with monkeypatch.context() as patch:
        Faults(patch, fails=lambda number: number == call + 5)  # the source takes the first five
        with pytest.raises(CheckpointError, match=r"a: Input/output error"):
            convert_to_public(tmp_path / "a", config, new, True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "source"]
    assert_same(load_checkpoint(tmp_path / "a"), config, old)


@pytest.mark.parametrize("first", range(6))
def test_a_disk_that_stays_broken_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Even the way back may fail; then the message says where the old checkpoint is."""
    config = tiny_config()
    old = random_weights(config, 1)
    save_ours(tmp_path / "a", config, old, False)
    with monkeypatch.context() as patch:
        Faults(patch, fails=lambda number: number >= first)
        with pytest.raises(CheckpointError) as info:
            save_ours(tmp_path / "a", config, random_weights(config, 2), True)
    retired = [entry for entry in tmp_path.iterdir() if entry.suffix == ".old"]
    assert len(retired) == (1 if first >= 4 else 0)
    assert all(str(path) in str(info.value) for path in retired)
    assert_same(load_checkpoint(retired[0] if retired else tmp_path / "a"), config, old)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter"), KeyboardInterrupt()]
)
def test_a_write_that_breaks_off_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    config = tiny_config()
    old = random_weights(config, 1)
    save_ours(tmp_path / "a", config, old, False)

    def break_off(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(native, "_write_safetensors", break_off)
        expected = CheckpointError if isinstance(error, Exception) else KeyboardInterrupt
        for name in ("a", "b"):
            with pytest.raises(expected):
                save_ours(tmp_path / name, config, random_weights(config, 2), True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert_same(load_checkpoint(tmp_path / "a"), config, old)


def test_rubbish_that_cannot_be_removed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    new = random_weights(config, 2)
    save_ours(tmp_path / "a", config, random_weights(config, 1), False)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.warns(RuntimeWarning, match=r"\.old: the replaced checkpoint could not be removed"):
            save_ours(tmp_path / "a", config, new, True)
    assert_same(load_checkpoint(tmp_path / "a"), config, new)

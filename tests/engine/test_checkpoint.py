"""Checkpoints: what is written is what is read, in every form, and each is found by its path or its name."""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from pixelflow_engine.checkpoint import convert, load_checkpoint, public, save_checkpoint
from pixelflow_engine.config import parameter_shapes
from pixelflow_engine.errors import CheckpointError
from pixelflow_engine.reference import PixelFlowTransformer
from support.checkpoints import (
    DTYPES,
    assert_same,
    digests,
    drawn_config,
    random_weights,
    tiny_config,
    write_public_config,
    write_training_checkpoint,
)

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
    shutil.copytree(tmp_path, tmp_path / "with-none", ignore=lambda folder, _: ["with-none"])
    torch.save(
        torch.load(tmp_path / "model_1.pt", weights_only=False) | {"ema": None}, tmp_path / "with-none" / "model_1.pt"
    )
    for folder in (tmp_path, tmp_path / "with-none"):
        assert_same(load_checkpoint(folder / "model_1.pt"), config, weights)
        message = r"model_1\.pt: a training checkpoint without weights under the key ema"
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder / "model_1.pt", weights="ema")


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
    Path("digits").mkdir()
    Path("digits/0.png").touch()
    assert_same(load_checkpoint("digits"), config, bundled)  # a folder of anything else does not hide it
    Path("digits/0.png").unlink()
    for sign in ("model_0001.pt", "x.safetensors", "config.yaml", "recipe.yaml"):  # what was meant is not passed over
        Path("digits", sign).touch()
        with pytest.raises(CheckpointError, match="digits"):
            load_checkpoint("digits")
        Path("digits", sign).unlink()
    save_checkpoint("digits", config, local, overwrite=True)
    assert_same(load_checkpoint("digits"), config, local)
    Path("digits/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"digits/model\.safetensors"):  # nor is a damaged one passed over
        load_checkpoint("digits")


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

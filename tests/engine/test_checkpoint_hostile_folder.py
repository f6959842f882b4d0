"""Hostile checkpoint folders: text, safetensors files and what is no file. Loading ends in a CheckpointError.

Each hostile file is a good one with one thing changed, so that what is refused is that thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelflow_engine.checkpoint import load_checkpoint, save_checkpoint
from pixelflow_engine.errors import CheckpointError
from support.hostile import (
    BAD_WEIGHTS,
    CONFIG,
    HEAD,
    Weights,
    assert_survives_or_refuses,
    edit_yaml,
    refused,
    some_weights,
    write_both_forms,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good checkpoint of each form, to be copied: writing one waits for the disk."""
    folder = tmp_path_factory.mktemp("originals")
    write_both_forms(folder)
    return folder


@pytest.fixture
def ours(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "ours", tmp_path / "ours")


@pytest.fixture
def public(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "public", tmp_path / "public")


# --- the public form: config.yaml ---------------------------------------------------------------------------


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "the file is empty"),
        (b"\n", "got NoneType, expected a mapping"),
        (b"just text", "got str, expected a mapping"),
        (b"[1, 2]", "got list, expected a mapping"),
        (b"model: [", "expected the node content"),
        (b"model: {}\n---\nmodel: {}", "but found another document"),
        (BOMB.encode(), "anchors and aliases are not accepted"),
        (b"model: &m {}", "anchors and aliases are not accepted"),
        (b"&m {}", "anchors and aliases are not accepted"),
        (b"model: *m", "anchors and aliases are not accepted"),
        (b"model: {a: 1, b: 2, a: 3}", "the key 'a' occurs twice"),
        (b"model: {}\nmodel: {}", "the key 'model' occurs twice"),
        (b"model: {<<: {a: 1}}", "a key must be a plain value"),
        (b"? [1]\n: 2", "a key must be a plain value"),
        (b"!!map [1, 2]", "expected a mapping node"),
        (b"date: 2025-13-45", "month must be in 1..12"),
        (b"[" * 30_000, "nested too deeply"),
        (b"[" * 400 + b"]" * 400, "nested too deeply"),
        (b"[" * 33 + b"]" * 33, "nested too deeply: more than 32 levels"),
        (b"a: " + b"{a: " * 10_000, "nested too deeply|is not|expected"),
        (b"- " * 10_000 + b"1", "nested too deeply"),
        (b"a: " + b"1" * 10_000, "integer string conversion"),
        (b"a: " + b":".join([b"59"] * 10_000), "unknown keys a|integer string"),
        (b"a" * 64 * 1024, "got str, expected a mapping"),
        (b"a" * (64 * 1024 + 1), "larger than 65536 bytes"),
        ("modèle: 1".encode("utf-16"), "can't decode byte"),
        (random.Random(0).randbytes(1000), "can't decode byte"),
        (b"model: \x00", "special characters are not allowed"),
    ],
)
def test_yaml_text(public: Path, text: bytes, why: str) -> None:
    (public / "config.yaml").write_bytes(text)
    refused(public, public / "config.yaml", why)


@pytest.mark.parametrize(
    ("section", "values", "why"),
    [
        ("", {"optimizer": {}, "extra": 1}, "config: unknown keys extra, optimizer"),
        ("", {"model": None}, "config.model: got NoneType, expected a mapping"),
        ("", {"scheduler": []}, "config.scheduler: got list, expected a mapping"),
        ("", {"train": [1]}, "train: got list, expected a mapping"),
        ("", {"data": None}, "data: expected a mapping with the key resolution"),
        ("", {"data": {"root": "x"}}, "data: expected a mapping with the key resolution"),
        ("", {"data": {"resolution": "16"}}, "resolution: got '16'"),
        ("", {"data": {"resolution": 17}}, "resolution: got 17, expected a positive multiple of 4"),
        ("", {"data": {"resolution": True}}, "resolution: got True"),
        ("", {"seed": "x"}, "config.seed: got 'x', expected an integer"),
        ("model", {"device": "cpu"}, "config.model: unknown keys device"),
        ("model", {"target": ["os", "system"]}, "config.model.target: got .*, expected a str"),
        ("params", {"head": 1}, "config.model.params: unknown keys head"),
        ("params", {"depth": -1}, "model.depth: got -1, expected an integer from 1 to 256"),
        ("params", {"depth": 10**9}, "model.depth: got 1000000000"),
        ("params", {"depth": 16**5000}, "too long to print"),
        ("params", {"depth": 1.0}, "config.model.params.depth: got 1.0, expected an integer"),
        ("params", {"depth": "1"}, "config.model.params.depth: got '1', expected an integer"),
        ("params", {"attention_head_dim": 6}, "expected a multiple of 4"),
        ("params", {"num_attention_heads": 10**6}, "model.num_attention_heads: got 1000000"),
        ("params", {"num_classes": 10**12}, "model.num_classes"),
        ("params", {"dropout": 10**400}, "dropout: got 1000"),
        ("params", {"dropout": float("nan")}, "expected a finite number"),
        ("scheduler", {"shift": 1}, "config.scheduler: unknown keys shift"),
        ("scheduler", {"pyramid_shift": True}, "pyramid_shift: got true, expected false or nothing: .*time windows"),
        ("scheduler", {"pyramid_shift": None}, "pyramid_shift: got None, expected a bool"),
        ("scheduler", {"num_stages": 0}, "num_stages: got 0"),
        ("scheduler", {"num_train_timesteps": 1}, "num_train_timesteps: got 1"),
    ],
)
def test_yaml_content(public: Path, section: str, values: dict[str, Any], why: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        places = {"": config, "model": config["model"], "params": config["model"]["params"]}
        (places | {"scheduler": config["scheduler"]})[section].update(values)

    if values == {"depth": 16**5000}:  # decimal, it is already the text that is refused
        text = (public / "config.yaml").read_text().replace("depth: 1\n", f"depth: 0x1{'0' * 5000}\n")
        (public / "config.yaml").write_text(text)
    else:
        edit_yaml(public, edit)
    refused(public, public / "config.yaml", why)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("", "model"),
        ("", "scheduler"),
        ("", "data"),
        ("model", "target"),
        ("model", "params"),
        ("params", "depth"),
        ("scheduler", "num_stages"),
        ("scheduler", "num_train_timesteps"),
    ],
)
def test_yaml_missing_key(public: Path, section: str, key: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        places = {"": config, "model": config["model"], "params": config["model"]["params"]}
        del (places | {"scheduler": config["scheduler"]})[section][key]

    edit_yaml(public, edit)
    refused(public, public / "config.yaml", f"missing keys {key}")


def test_yaml_cut_off(public: Path) -> None:
    text = (public / "config.yaml").read_bytes()
    for length in range(0, len(text) - len(b"  resolution: 16\n"), 7):
        (public / "config.yaml").write_bytes(text[:length])
        refused(public, public / "config.yaml", "")


def test_no_name_in_yaml_is_imported(public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "trap.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Model: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit_yaml(public, lambda config: config["model"].update(target="trap.Model"))
    load_checkpoint(public)
    assert not marker.exists()
    for text in (
        "model: !!python/object/apply:os.system ['touch \"{}\"']",
        "model: !!python/object:trap.Model {{}}",
        "model: !!python/name:trap.Model ''",
        "model: !!python/module:trap ''",
        "model: !!python/object/new:trap.Model []",
        "? !!python/object/apply:os.system ['touch \"{}\"']\n: 1",
    ):
        (public / "config.yaml").write_text(text.format(marker))
        refused(public, public / "config.yaml", "could not determine a constructor|must be a plain value")
    assert not marker.exists()
    assert "trap" not in sys.modules


# --- our form -----------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:start])
    return header, data[start:]


def joined(header: dict[str, Any] | bytes, values: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def edit_ours(folder: Path, edit: Callable[[dict[str, Any], bytearray], Any]) -> None:
    header, values = split((folder / "model.safetensors").read_bytes())
    changed = bytearray(values)
    edit(header, changed)
    (folder / "model.safetensors").write_bytes(joined(header, bytes(changed)))


def with_config(folder: Path, data: bytes) -> None:
    """Another configuration, and its digest: what somebody does who means it."""
    (folder / "config.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_ours(folder, lambda header, _: header["__metadata__"].update({"sha256.config.json": digest}))


def with_tensors(folder: Path, tensors: Weights) -> None:
    """Other tensors, and their digests."""
    names = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32", torch.bool: "BOOL", torch.uint8: "U8"}
    header, _ = split((folder / "model.safetensors").read_bytes())
    metadata = {key: value for key, value in header["__metadata__"].items() if not key.startswith("sha256.")}
    metadata["sha256.config.json"] = header["__metadata__"]["sha256.config.json"]
    fresh: dict[str, Any] = {"__metadata__": metadata}
    values = b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        text = f"{names[tensor.dtype]} {list(tensor.shape)}\n".encode()
        metadata[f"sha256.{name}"] = hashlib.sha256(text + data).hexdigest()
        offsets = [len(values), len(values) + len(data)]
        fresh[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        values += data
    (folder / "model.safetensors").write_bytes(joined(fresh, values))


@pytest.mark.parametrize(("change", "why"), BAD_WEIGHTS)
def test_safetensors_weights(ours: Path, change: Callable[[Weights], Any], why: str) -> None:
    with_tensors(ours, some_weights())
    load_checkpoint(ours)  # the helper's files are good
    with_tensors(ours, change(some_weights()))
    refused(ours, ours / "model.safetensors", why)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda h, v: h.pop("__metadata__"), "got pixelflow_engine.checkpoint None in its metadata"),
        (lambda h, v: h["__metadata__"].pop("pixelflow_engine.checkpoint"), "expected 1"),
        (lambda h, v: h["__metadata__"].update({"pixelflow_engine.checkpoint": "2" * 10_000}), "expected 1"),
        (lambda h, v: h["__metadata__"].pop(f"sha256.{HEAD}"), f"records no digest of {HEAD}"),
        (lambda h, v: h["__metadata__"].update({f"sha256.{HEAD}": ""}), f"{HEAD} is not what was written"),
        (lambda h, v: h["__metadata__"].update({f"sha256.{HEAD}": 7}), "invalid"),
        (lambda h, v: v.__setitem__(0, v[0] ^ 1), "is not what was written"),
        (lambda h, v: v.extend(b"more"), "MetadataIncompleteBuffer|incomplete|invalid"),
        (lambda h, v: v.pop(), "(?i)incomplete"),
        (lambda h, v: h[HEAD].update(shape=[4, 12]), r"got shape \[4, 12\]"),
        (lambda h, v: h[HEAD].update(shape=[-12, -4]), "invalid"),
        (lambda h, v: h[HEAD].update(shape=[2**32, 2**32]), "(?i)overflow|invalid"),
        (lambda h, v: h[HEAD].update(dtype="I32"), "got type I32"),
        (lambda h, v: h[HEAD].update(dtype="F16"), "(?i)invalid"),
        (lambda h, v: h[HEAD].update(dtype="PICKLE"), "unknown variant"),
        (lambda h, v: h[HEAD].update(data_offsets=[0, 192]), "(?i)invalid|offset"),
        (lambda h, v: h[HEAD].update(data_offsets=[192, 0]), "(?i)invalid|offset"),
        (lambda h, v: h.update({"x" * 5000: h.pop(HEAD)}), "missing proj_out_2.weight; not part of the model: xxx"),
        (lambda h, v: swapped(h), "is not what was written"),
    ],
)
def test_safetensors_header(ours: Path, edit: Callable[[dict[str, Any], bytearray], Any], why: str) -> None:
    edit_ours(ours, lambda header, values: None)
    load_checkpoint(ours)  # the helper's files are good
    edit_ours(ours, edit)
    refused(ours, ours / "model.safetensors", why)


def swapped(header: dict[str, Any]) -> None:
    """Exchange two tensors of one shape: every name, shape and byte is still there."""
    a, b = (header[f"transformer_blocks.0.attn1.{x}_proj.weight"] for x in "qk")
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def test_safetensors_text(ours: Path) -> None:
    path = ours / "model.safetensors"
    good = path.read_bytes()
    _, values = split(good)
    noise = random.Random(0).randbytes(5000)
    for data, why in (
        (b"", "header of 0 bytes"),
        (b"\x01\x00", "not a whole safetensors file"),
        (bytes(8), "(?i)header"),
        (noise, "not a whole safetensors file"),
        ((2**64 - 1).to_bytes(8, "little") + good[8:], "not a whole safetensors file"),
        (len(good).to_bytes(8, "little") + good[8:], "no more than the file holds"),
        (joined(b"{" * 10_000, values), "(?i)header"),
        (joined(b'{"a":' * 10_000, values), "(?i)header"),
        (joined(b" " * 17_000_000, values), "at most 16777216"),
        (joined(b"{}", b""), "in its metadata"),
        (joined(b"[]", b""), "(?i)header"),
        (joined(noise, values), "(?i)header"),
    ):
        path.write_bytes(data)
        refused(ours, path, why)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "the file is empty"),
        (b"{", "property name"),
        (b"null", "got NoneType, expected a mapping"),
        (b"[1]", "got list, expected a mapping"),
        (b'{"model": 1, "model": 2}', "the key 'model' occurs twice"),
        (b'{"resolution": NaN}', "got NaN, expected a finite number"),
        (b'{"resolution": -Infinity}', "got -Infinity, expected a finite number"),
        (b'{"a": ' * 10_000, "nested too deeply"),
        (b"[" * 33 + b"]" * 33, "nested too deeply: more than 32 levels"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"resolution": ' + b"1" * 10_000 + b"}", "integer string conversion"),
        (b" " * (64 * 1024 + 1), "larger than 65536 bytes"),
        (b"\xff\xfe{\x00}\x00", "can't decode byte"),
        (b"\x80\x04N.", "can't decode byte"),
        (b'{"model": {}, "scheduler": {}, "resolution": 16, "more": 1}', "config: unknown keys more"),
        (b'{"model": {"depth": 1}}', "missing keys num_attention_heads, attention_head_dim"),
        (b'{"model": {"num_attention_heads": 1, "attention_head_dim": 4, "depth": 1000000000}}', "got 1000000000"),
        (b'{"model": {"num_attention_heads": 1, "attention_head_dim": 4, "depth": -1}}', "got -1"),
        (b'{"model": {"num_attention_heads": 1, "attention_head_dim": 4, "depth": true}}', "got True"),
    ],
)
def test_json(ours: Path, text: bytes, why: str) -> None:
    with_config(ours, (ours / "config.json").read_bytes() + b"\n")
    load_checkpoint(ours)  # the helper's files are good
    with_config(ours, text)
    refused(ours, ours / "config.json", why)


def test_a_change_to_the_config_is_noticed(ours: Path) -> None:
    text = (ours / "config.json").read_text()
    (ours / "config.json").write_text(text.replace('"num_stages": 2', '"num_stages": 1'))
    refused(ours, ours / "config.json", "config.json is not what was written: SHA-256")


def test_ours_cut_off(ours: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        good = (ours / name).read_bytes()
        for length in [*range(0, len(good), len(good) // 30), len(good) - 1]:
            (ours / name).write_bytes(good[:length])
            refused(ours, ours / name, "")
        (ours / name).write_bytes(good)


def test_flipped_bits(ours: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    path, config = ours / "model.safetensors", ours / "config.json"
    good = path.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    metadata_end = good.index(b"}", 8)

    def some(count: int, begin: int, end: int) -> list[int]:
        return [draw.randrange(8 * begin, 8 * end) for _ in range(count)]

    regions = {
        "header length": list(range(64)),
        "metadata": some(150, 8, metadata_end),
        "tensor entries": some(150, metadata_end, start),
        "end of the header": some(30, start - 8, start),
        "tensors": some(150, start, len(good)),
    }
    for region, positions in regions.items():
        seen, unseen = assert_survives_or_refuses(ours, path, good, positions)
        print(region, seen, unseen)
        if region != "metadata":  # "format": "pt" is for other programs
            assert unseen == 0, region
    text = config.read_bytes()
    seen, unseen = assert_survives_or_refuses(ours, config, text, some(100, 0, len(text)))
    assert (seen, unseen) == (100, 0)


# --- files that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "config.yaml", "model.pt"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "absent", "broken link", "unreadable"])
def test_something_else_in_a_files_place(ours: Path, public: Path, name: str, kind: str) -> None:
    folder = ours if (ours / name).exists() else public
    path = folder / name
    if kind == "unreadable":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("may read everything")
        refused(folder, path, "Permission denied")
        return
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "broken link":
            path.symlink_to(folder / "nowhere")
    if name == "config.yaml" and kind in ("absent", "broken link"):
        refused(folder, folder, "holds neither config.json with model.safetensors nor config.yaml with model.pt")
    else:
        refused(folder, path, "no such file" if kind in ("absent", "broken link") else "not a file")


def test_neither_folder_nor_pt(tmp_path: Path, ours: Path) -> None:
    refused(tmp_path, tmp_path, "holds neither")
    refused(ours / "config.json", ours / "config.json", "expected a folder or a .pt file")
    refused(ours / "model.safetensors", ours / "model.safetensors", "expected a folder or a .pt file")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", tmp_path / "config.yaml", "no such file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop"):
        load_checkpoint(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop"):
        save_checkpoint(tmp_path / "loop", CONFIG, some_weights())

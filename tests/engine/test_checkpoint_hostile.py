"""Checkpoints from elsewhere: whatever is in a file, loading it runs nothing, and ends in a CheckpointError.

Each hostile file is a good one with one thing changed, so that what is refused is that thing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pixelflow_engine.checkpoint import convert, load_checkpoint, save_checkpoint
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, SchedulerConfig, parameter_shapes
from pixelflow_engine.errors import CheckpointError

CONFIG = PixelFlowConfig(
    model=ModelConfig(num_attention_heads=1, attention_head_dim=4, depth=1, patch_size=2, num_classes=3),
    scheduler=SchedulerConfig(num_stages=2),
    resolution=16,
)
HEAD = "proj_out_2.weight"  # [12, 4]
Weights = dict[str, Tensor]


def some_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator) for n, shape in parameter_shapes(CONFIG.model).items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good checkpoint of each form, to be copied: writing one waits for the disk."""
    folder = tmp_path_factory.mktemp("originals")
    save_checkpoint(folder / "ours", CONFIG, some_weights())
    convert(folder / "ours", folder / "public", to="public")
    return folder


@pytest.fixture
def ours(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "ours", tmp_path / "ours")


@pytest.fixture
def public(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "public", tmp_path / "public")


def refused(checkpoint: Path, file: Path, why: str) -> None:
    """Loading ends in a CheckpointError that names the file and says why, in few words."""
    with pytest.raises(CheckpointError) as info:
        load_checkpoint(checkpoint)
    message = str(info.value)
    assert message.startswith(f"{file}: "), message
    assert re.search(why, message), message
    assert len(message) < len(str(file)) + 1000
    assert "\n" not in message


# --- code ---------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class NotANamespace(argparse.Namespace):
    pass


def touching(marker: Path) -> dict[str, Any]:
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Payload(os.system, f"touch '{marker}'"),
        "builtins.exec": Payload(exec, code),
        "builtins.eval": Payload(eval, code),
        "subprocess.call": Payload(subprocess.call, ["touch", str(marker)]),
        "pathlib": Payload(Path.touch, marker),
    }


def test_the_payloads_work(tmp_path: Path) -> None:
    for name, payload in touching(tmp_path / "marker").items():
        pickle.loads(pickle.dumps(payload))
        assert (tmp_path / "marker").exists(), f"{name} would prove nothing"
        (tmp_path / "marker").unlink()


@pytest.mark.parametrize("name", touching(Path()))
@pytest.mark.parametrize("place", ["whole", "beside the weights", "in a tensor's place", "in args", "in a Namespace"])
def test_no_code_runs(public: Path, tmp_path: Path, name: str, place: str) -> None:
    marker = tmp_path / "marker"
    payload, weights = touching(marker)[name], some_weights()
    content = {
        "whole": payload,
        "beside the weights": weights | {"more": payload},
        "in a tensor's place": weights | {HEAD: payload},
        "in args": {"model": weights, "ema": weights, "opt": {}, "args": payload},
        "in a Namespace": {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(a=[payload])},
    }[place]
    torch.save(content, public / "model.pt")
    refused(public, public / "model.pt", r"names \S+, which is neither run nor imported|pickle with|takes from")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_no_code_runs_in_older_formats(public: Path, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    payload = touching(marker)["os.system"]
    (public / "model.pt").write_bytes(pickle.dumps(payload, protocol=protocol))
    refused(public, public / "model.pt", "not a file that torch.save wrote")
    torch.save(payload, public / "model.pt", pickle_protocol=protocol)
    refused(public, public / "model.pt", "pickle|names")
    torch.save(payload, public / "model.pt", _use_new_zipfile_serialization=False)
    refused(public, public / "model.pt", "not a file that torch.save wrote")
    assert not marker.exists()


def test_namespace_is_the_only_class(public: Path) -> None:
    """By name, not by kind: its subclasses, torch's own helpers and harmless containers are not in a checkpoint."""
    weights = some_weights()
    for value in (
        NotANamespace(),
        Path("x"),
        {1, 2},
        1j,
        bytearray(3),
        torch.float32,
        torch.device("cpu"),
        torch.Size([1]),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged),
    ):
        torch.save({"model": weights, "opt": {}, "args": argparse.Namespace(value=value)}, public / "model.pt")
        refused(public, public / "model.pt", "names |pickle with |that torch.save does not")
    torch.save({"model": weights, "opt": {}, "args": argparse.Namespace(value=1)}, public / "model.pt")
    load_checkpoint(public)


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


# --- the public form: config.yaml ---------------------------------------------------------------------------


def edit_yaml(public: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((public / "config.yaml").read_text())
    edit(config)
    (public / "config.yaml").write_text(yaml.safe_dump(config))


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


# --- the public form: model.pt ------------------------------------------------------------------------------


def without_head(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if name != HEAD}


def with_head(change: Callable[[Tensor], Any]) -> Callable[[Weights], Any]:
    return lambda weights: weights | {HEAD: change(weights[HEAD])}


def spoiled(value: float) -> Callable[[Weights], Any]:
    return with_head(lambda t: t.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value)))


BAD_WEIGHTS = [
    (without_head, f"missing {HEAD}"),
    (lambda w: w | {"more": torch.zeros(1)}, "not part of the model: more"),
    (lambda w: {f"module.{name}": tensor for name, tensor in w.items()}, "missing .* and .* more; not part"),
    (with_head(lambda t: t[:-1].clone()), r"got shape \[11, 4\], expected \[12, 4\]"),
    (with_head(lambda t: t.reshape(4, 12)), r"got shape \[4, 12\], expected \[12, 4\]"),
    (with_head(lambda t: t[None]), r"got shape \[1, 12, 4\]"),
    (with_head(lambda t: t.to(torch.int32)), "got type"),
    (with_head(lambda t: t > 0), "got type"),
    (spoiled(float("nan")), "1 of 48 values are not finite"),
    (spoiled(float("inf")), "1 of 48 values are not finite"),
]


@pytest.mark.parametrize(("change", "why"), BAD_WEIGHTS)
@pytest.mark.parametrize("form", ["plain", "training"])
def test_pt_weights(public: Path, form: str, change: Callable[[Weights], Any], why: str) -> None:
    changed = change(some_weights())
    torch.save(changed if form == "plain" else {"ema": changed, "model": some_weights()}, public / "model.pt")
    refused(public, public / "model.pt", why)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([1, 2], "holds a list, expected a dict"),
        (torch.zeros(3), "holds a Tensor, expected a dict"),
        (None, "holds a NoneType, expected a dict"),
        ({}, "0 tensors, expected"),
        ({"ema": None, "model": None}, "the weights are a NoneType, expected a dict of tensors"),
        ({"ema": [torch.zeros(1)]}, "the weights are a list, expected a dict of tensors"),
        ({"state_dict": {}}, "got a dict, expected a tensor"),
        ({1: torch.zeros(1)}, "a tensor's name is a int"),
        ({"opt": {}, "args": argparse.Namespace()}, "got a dict, expected a tensor"),
    ],
)
def test_pt_content(public: Path, content: Any, why: str) -> None:
    torch.save(content, public / "model.pt")
    refused(public, public / "model.pt", why)


def test_pt_few_bytes_as_a_large_tensor(public: Path) -> None:
    """The largest model that a configuration can ask for has 70 TB; its file here has a megabyte."""
    edit_yaml(public, lambda c: c["model"]["params"].update(num_attention_heads=256, attention_head_dim=512, depth=256))
    config = PixelFlowConfig(
        model=ModelConfig(num_attention_heads=256, attention_head_dim=512, depth=256, patch_size=2, num_classes=3)
    )
    one = torch.zeros(1)
    shapes = parameter_shapes(config.model)
    torch.save({name: one.expand(shape) for name, shape in shapes.items()}, public / "model.pt")
    refused(public, public / "model.pt", "they share or repeat their memory")


def rewrite(path: Path, edit: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    """Write an archive again, each record changed or left out."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in records:
            if (changed := edit(name, data)) is not None:
                archive.writestr(name, changed)


def with_pickle(path: Path, data: bytes) -> None:
    rewrite(path, lambda name, old: data if name.endswith("/data.pkl") else old)


def test_pt_archive_written_by_another_zip_tool(public: Path) -> None:
    rewrite(public / "model.pt", lambda name, data: data)
    weights = load_checkpoint(public).state_dict
    assert all(torch.equal(weights[name], tensor) for name, tensor in some_weights().items())


def test_pt_records(public: Path) -> None:
    path = public / "model.pt"
    good = path.read_bytes()

    def expect(why: str, edit: Callable[[str, bytes], bytes | None], **options: Any) -> None:
        path.write_bytes(good)
        rewrite(path, edit, **options)
        refused(public, path, why)

    expect("holds compressed records", lambda n, d: d, compression=zipfile.ZIP_DEFLATED)
    expect("storage 0 has None bytes", lambda n, d: None if n.endswith("/data/0") else d)
    expect("storage 0 has 4 bytes in the file, expected 192", lambda n, d: d[:4] if n.endswith("/data/0") else d)
    expect("storage 0 has 196 bytes", lambda n, d: d + b"more" if n.endswith("/data/0") else d)
    expect("no data.pkl", lambda n, d: None if n.endswith("/data.pkl") else d)
    expect("has 4194305 bytes", lambda n, d: d.ljust(4194305) if n.endswith("/data.pkl") else d)
    expect("not a file that torch.save wrote", lambda n, d: None)

    path.write_bytes(good)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/constants.pkl", b"")
    refused(public, path, "no data.pkl, or a TorchScript program")
    for name in ("model/data.pkl", "model/DATA.PKL"):  # torch's reader may take the one, zipfile the other
        path.write_bytes(good)
        with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
            archive.writestr(name, b"")
        refused(public, path, "a record occurs twice")
    path.write_bytes(good)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 500
    refused(public, path, "comment")


def test_pt_a_record_counted_twice(public: Path) -> None:
    """Many directory entries for the same bytes: each would be read for its checksum."""
    path = public / "model.pt"
    torch.save(some_weights() | {"padding": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        large = max(archive.infolist(), key=lambda entry: entry.file_size)
        entries = archive.infolist()
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(3):
            twin = zipfile.ZipInfo(f"model/twin/{i}")
            twin.file_size, twin.compress_size, twin.CRC = large.file_size, large.compress_size, large.CRC
            twin.header_offset = large.header_offset
            archive.filelist.append(twin)
        archive._didModify = True  # type: ignore[attr-defined]  # writes the directory again on closing
    assert len(zipfile.ZipFile(path).infolist()) == len(entries) + 3
    refused(public, path, "its records claim .* bytes, more than the file has")


def test_pt_two_archives_in_a_row(public: Path) -> None:
    """``zipfile`` reads the second one, torch's reader the first one, which nobody would have checked."""
    path = public / "model.pt"
    good, other = path.read_bytes(), torch_bytes({name: torch.zeros_like(x) for name, x in some_weights().items()})
    assert len(good) == len(other)
    path.write_bytes(other + good)
    assert zipfile.ZipFile(path).testzip() is None
    refused(public, path, "its 64-bit end record is not at")

    rewrite(path, lambda name, data: data)  # without 64-bit records
    path.write_bytes(other[:100] + path.read_bytes())
    assert zipfile.ZipFile(path).testzip() is None
    refused(public, path, "its directory of .* bytes is not at .*: not one whole archive")


@pytest.mark.parametrize(
    ("from_end", "why"),
    [(42 - 8, "its 64-bit end record is not at"), (98 - 32, "its directory has .* entries, the file says")],
    ids=["locator", "entries"],
)
def test_pt_end_records(public: Path, from_end: int, why: str) -> None:
    """``zipfile`` does not look at these fields, torch's reader does."""
    path = public / "model.pt"
    changed = bytearray(path.read_bytes())
    changed[-from_end] ^= 1
    path.write_bytes(changed)
    assert zipfile.ZipFile(path).testzip() is None
    refused(public, path, why)


def torch_bytes(content: Any) -> bytes:
    """What ``torch.save`` writes to a file called model.pt."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(content, Path(folder) / "model.pt")
        return (Path(folder) / "model.pt").read_bytes()


def numel(pickled: bytes, count: int, to: bytes) -> bytes:
    """Change how many elements the first storage claims to have."""
    at = re.search(rb"cpuq.K" + re.escape(bytes([count])), pickled, re.DOTALL)
    assert at is not None
    return pickled[: at.end() - 2] + to + pickled[at.end() :]


def test_pt_storages_and_tensors_that_disagree(public: Path) -> None:
    path = public / "model.pt"
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("model/data.pkl")
    first = some_weights()["patch_embed.proj.weight"]
    for claim in (b"K\x01", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\x7f" * 8):
        path.write_bytes(good)
        with_pickle(path, numel(pickled, first.numel(), claim))
        refused(public, path, "storage 0 has 192 bytes in the file, expected")
    # Storage and record agree, and are smaller than the tensor.
    path.write_bytes(good)
    small = numel(pickled, first.numel(), b"K\x01")
    rewrite(path, lambda n, d: small if n.endswith("data.pkl") else d[:4] if n.endswith("/data/0") else d)
    refused(public, path, "storage")


def storage(kind: bytes) -> bytes:
    """The opcodes that refer to the first storage of the fixture, of 48 floats."""
    return b"(X\x07\x00\x00\x00storagec" + kind + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK0tQ"


def tensor(shape: bytes = b"K\x0cK\x04\x86", hooks: bytes = b"ccollections\nOrderedDict\n)R") -> bytes:
    """The opcodes of a tensor of that storage."""
    arguments = storage(b"torch\nFloatStorage") + b"K\x00" + shape + b"K\x04K\x01\x86" + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "ends in the middle|STOP"),
        (b".", "ends in the middle"),
        (b"N", "STOP"),
        (b"}(.", "ends in the middle"),
        (b"\x85.", "from an empty stack"),
        (b"}K\x01s.", "index out of range"),
        (b"h\x00.", "0"),
        (b"t.", "pop from empty list"),
        (b")K\x01K\x02s.", "sets an item of what is not a dict"),
        (b"}(K\x01u.", "a key without a value"),
        (b"})K\x01s.", "no string or integer"),
        # A crash of the interpreter, if the key were hashed.
        (b"})" + b"\x85" * 200_000 + b"K\x01s.", "no string or integer"),
        (b"}()" + b"\x85" * 200_000 + b"K\x01u.", "no string or integer"),
        (
            b"ccollections\nOrderedDict\n])" + b"\x85" * 200_000 + b"K\x01\x86a\x85R.",
            "calls collections.OrderedDict in",
        ),
        (b"ccollections\nOrderedDict\n)R])" + b"\x85" * 200_000 + b"K\x01\x86ab.", "attributes of what has none"),
        (
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)" + b"\x85" * 200_000 + b"X\x03\x00\x00\x00cpuK\x01tQ.",
            "refers",
        ),
        (storage(b"torch\nFloatStorage") + storage(b"torch\nHalfStorage") + b"\x86.", "a storage of two sizes"),
        (storage(b"torch\nComplexFloatStorage") + b".", "names torch.ComplexFloatStorage"),
        (storage(b"torch.storage\nUntypedStorage") + b".", "names torch.storage.UntypedStorage"),
        (storage(b"argparse\nNamespace") + b".", "refers to data in a way"),
        (tensor() + b".", "holds a Tensor, expected a dict"),  # the next ones start from it
        (tensor(shape=b"K\x0cJ\xff\xff\xff\xff\x86") + b".", "without a proper shape"),
        (tensor(shape=b")" + b"\x85" * 200_000) + b".", "without a proper shape"),
        (tensor(hooks=b"cargparse\nNamespace\n)R") + b".", "without a proper shape"),
        (tensor(hooks=b"}") + b".", "calls torch._utils._rebuild_tensor_v2 in"),
        (tensor(shape=b"KdKd\x86") + b".", "storage"),
        (b")" + b"\x85" * 200_000 + b".", "holds a tuple, expected a dict"),
        (b"N" * 250_000 + b".", "more than 250000 steps"),
        # Memory for the asking.
        (b"cbuiltins\nbytearray\n\x8a\x08\x00\x00\x00\x00\x01\x00\x00\x00\x85R.", "names builtins.bytearray"),
        (b"ctorch\nFloatTensor\n\x8a\x08\x00\x00\x00\x00\x01\x00\x00\x00\x85R.", "names torch.FloatTensor"),
        (b"}r\xff\xff\xff\x7f.", "0 tensors"),
        (b"X\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "expected|bytes"),
        # Ways round the list of names.
        (b"cos\nsystem\n.", "names os.system"),
        (b"c__builtin__\neval\n.", "names __builtin__.eval"),
        (b"cposix\nsystem\n.", "names posix.system"),
        (b"cargparse\nArgumentParser\n.", "names argparse.ArgumentParser"),
        (b"ctorch.serialization\nload\n.", "names torch.serialization.load"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "pickle with STACK_GLOBAL"),
        (b"(ios\nsystem\n.", "pickle with INST"),
        (b"(cargparse\nNamespace\no.", "pickle with OBJ"),
        (b"\x82\x01.", "pickle with EXT1"),
        (b"Pname\n.", "pickle with PERSID"),
        (b"cargparse\nNamespace\nK\x01\x85R.", "calls argparse.Namespace in"),
        (b"cargparse\nNamespace\n}R.", "calls what is no function|calls argparse.Namespace in"),
        (b"cargparse\nNamespace\n)\x81N}X\x09\x00\x00\x00__class__Ns\x86b.", "attributes of what has none"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "calls torch._utils._rebuild_tensor_v2 in"),
        (b"ctorch._utils\n_rebuild_parameter\n(K\x01\x88}tR.", "calls torch._utils._rebuild_parameter in"),
        (b"}]K\x01a)R.", "calls what is no function"),
        (b"\x80\x04}.", "protocol 4, expected 2"),
    ],
)
def test_pt_pickle(public: Path, body: bytes, why: str) -> None:
    with_pickle(public / "model.pt", b"\x80\x02" + body)
    refused(public, public / "model.pt", why)


def test_pt_cut_off(public: Path) -> None:
    data = (public / "model.pt").read_bytes()
    for length in [*range(0, 200, 9), *range(200, len(data), len(data) // 40), len(data) - 1]:
        (public / "model.pt").write_bytes(data[:length])
        refused(public, public / "model.pt", "")


def test_pt_garbage(public: Path) -> None:
    noise = random.Random(0).randbytes(5000)
    for data in (
        noise,
        b"PK\x03\x04" + noise,
        b"PK\x05\x06" + bytes(18),
        b"PK\x03\x04" + noise + b"PK\x05\x06" + bytes(18),
    ):
        (public / "model.pt").write_bytes(data)
        refused(public, public / "model.pt", "")


def test_pt_flipped_bits(public: Path) -> None:
    """Not a promise for config.yaml, which has no checksum; of model.pt's own bytes none changes unseen."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    path, good = public / "model.pt", (public / "model.pt").read_bytes()
    assert_survives_or_refuses(public, path, good, [draw.randrange(8 * len(good)) for _ in range(150)])


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


def assert_survives_or_refuses(checkpoint: Path, path: Path, good: bytes, positions: list[int]) -> tuple[int, int]:
    """Flip one bit at a time: the same checkpoint comes back, or none. Returns how often it did which."""
    messages: list[str] = []
    weights = {name: tensor.numpy().tobytes() for name, tensor in some_weights().items()}
    for position in positions:
        data = bytearray(good)
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        try:
            got = load_checkpoint(checkpoint)
        except CheckpointError as error:
            messages.append(str(error))
            continue
        where = f"{path.name}: bit {position % 8} of byte {position // 8}"
        assert got.config == CONFIG, where
        assert {n: t.numpy().tobytes() for n, t in got.state_dict.items()} == weights, where
        assert all(t.dtype == torch.float32 for t in got.state_dict.values()), where
        assert {n: tuple(t.shape) for n, t in got.state_dict.items()} == parameter_shapes(CONFIG.model), where
    path.write_bytes(good)
    assert all(message.startswith(str(checkpoint)) for message in messages)
    return len(messages), len(positions) - len(messages)


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

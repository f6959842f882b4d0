"""Hostile ``.pt`` files: whatever an archive and its pickle hold, no code runs, and loading ends in a CheckpointError.

Each hostile file is a good one with one thing changed, so that what is refused is that thing.
"""

from __future__ import annotations

import argparse
import os
import pickle
import random
import re
import secrets
import shutil
import subprocess
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelflow_engine.checkpoint import load_checkpoint
from pixelflow_engine.config import ModelConfig, PixelFlowConfig, parameter_shapes
from support.hostile import (
    BAD_WEIGHTS,
    HEAD,
    Weights,
    assert_survives_or_refuses,
    edit_yaml,
    refused,
    some_weights,
    write_both_forms,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint, to be copied: writing one waits for the disk."""
    folder = tmp_path_factory.mktemp("original")
    write_both_forms(folder)
    return folder / "public"


@pytest.fixture
def public(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "public")


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


# --- weights ------------------------------------------------------------------------------------------------


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
        ({"ema": None, "model": None}, "a training checkpoint without weights under the key model"),
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


# --- the archive --------------------------------------------------------------------------------------------


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


# --- the pickle ---------------------------------------------------------------------------------------------


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


# --- damage -------------------------------------------------------------------------------------------------


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

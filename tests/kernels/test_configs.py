"""Launch configurations: what is shipped is valid, the right file is asked, and bad ones are refused by place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelflow_kernels import configs

GOOD = {"op.kernel": {"small": {"BLOCK_M": 16, "num_warps": 4}, "large": {"BLOCK_M": 128, "num_warps": 8}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables of our own in place of the shipped ones."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs._shipped.cache_clear()
    yield tmp_path
    configs._shipped.cache_clear()


def test_shipped_tables_are_valid_and_written_as_the_tuner_writes_them(tmp_path: Path) -> None:
    names = {path.stem for path in configs.FOLDER.glob("*.json")}
    assert names == {"default", *(f"sm_{arch}" for arch in configs.ARCHITECTURES)}
    default = configs.read_table(configs.FOLDER / "default.json")
    for name in names:
        table = configs.read_table(configs.FOLDER / f"{name}.json")
        configs.write_table(table, tmp_path / "again.json")
        assert (tmp_path / "again.json").read_text() == (configs.FOLDER / f"{name}.json").read_text(), name
        for op, classes in table.items():
            assert {*classes} <= {*default.get(op, {})}, f"{name}: {op}: a shape class without a default"


def test_the_architectures_file_is_asked_first(folder: Path) -> None:
    configs.write_table(GOOD, folder / "default.json")
    configs.write_table({"op.kernel": {"large": {"BLOCK_M": 64, "num_warps": 8}}}, folder / "sm_90.json")
    assert configs.launch_config("op.kernel", "large", 90)["BLOCK_M"] == 64
    assert configs.launch_config("op.kernel", "small", 90)["BLOCK_M"] == 16
    for other in (80, 89, 103, None):
        assert configs.launch_config("op.kernel", "large", other)["BLOCK_M"] == 128
    configs.launch_config("op.kernel", "large", 90).clear()  # a copy: the next caller is not touched
    assert configs.launch_config("op.kernel", "large", 90) == {"BLOCK_M": 64, "num_warps": 8}


def test_unknown_names_are_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"op: got 'x', expected one with launch configurations: none"):
        configs.launch_config("x", "small", 90)
    configs.write_table(GOOD, folder / "default.json")
    configs._shipped.cache_clear()
    with pytest.raises(ValueError, match=r"op: got 'x', expected .*: op\.kernel"):
        configs.launch_config("x", "small", 90)
    with pytest.raises(ValueError, match=r"shape_class: got 'huge' for op\.kernel, expected one of large, small"):
        configs.launch_config("op.kernel", "huge", None)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], r"t\.json: got \[\], expected an object"),
        ({"op": 3}, r"t\.json: op: got 3, expected an object"),
        ({"op": {"c": None}}, r"t\.json: op: c: got None, expected an object"),
        ({"op": {"c": {"num_warps": "4"}}}, "op: c: num_warps: got '4', expected an integer in 1..32"),
        ({"op": {"c": {"num_warps": True}}}, "num_warps: got True"),
        ({"op": {"c": {"num_warps": 3}}}, "num_warps: got 3, expected a power of two"),
        ({"op": {"c": {"num_warps": 64}}}, "num_warps: got 64, expected an integer in 1..32"),
        ({"op": {"c": {"num_warps": 4, "num_stages": 0}}}, "num_stages: got 0"),
        ({"op": {"c": {"num_warps": 4, "BLOCK_M": 48}}}, "BLOCK_M: got 48, expected a power of two"),
        ({"op": {"c": {"num_warps": 4, "block": 64}}}, "got the name 'block', expected an upper-case constant"),
        ({"op": {"c": {"BLOCK_M": 64}}}, "op: c: got no num_warps"),
    ],
)
def test_bad_tables_are_refused_by_place(table: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        configs.read_table(path)
    path.unlink()
    with pytest.raises(ValueError, match=message):
        configs.write_table(table, path)
    assert not path.exists()


@pytest.mark.parametrize(("text", "message"), [("{", "t.json: Expecting"), ('{"a": {}, "a": {}}', "'a' occurs twice")])
def test_bad_files_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        configs.read_table(tmp_path / "t.json")


def test_architecture_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs.arch_of(None) is None
    assert configs.arch_of("cpu") is None
    assert configs.arch_of(torch.device("meta")) is None
    configs._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert configs.arch_of("cuda:1") == 91
    assert configs.arch_of("cuda") == 90
    configs._capability.cache_clear()

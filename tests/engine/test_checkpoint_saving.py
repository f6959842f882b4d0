"""Saving checkpoints: only what loads again, nothing overwritten unasked, and a failed write changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine.checkpoint import convert, load_checkpoint, native, save_checkpoint
from pixelflow_engine.config import PixelFlowConfig
from pixelflow_engine.errors import CheckpointError
from support.checkpoints import DTYPES, Weights, assert_same, random_weights, tiny_config, write_training_checkpoint

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
    save_checkpoint(tmp_path / "b", config, new)
    for write in (
        lambda: save_checkpoint(tmp_path / "a", config, new),
        lambda: convert(tmp_path / "b", tmp_path / "a", to="public"),
    ):
        with pytest.raises(CheckpointError, match=r"a: exists already, and overwrite"):
            write()
        assert_same(load_checkpoint(tmp_path / "a"), config, old)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_overwrite(tmp_path: Path) -> None:
    config, other = tiny_config(), tiny_config(depth=2)
    save_checkpoint(tmp_path / "a", config, random_weights(config))
    save_checkpoint(tmp_path / "a", other, random_weights(other), overwrite=True)
    assert_same(load_checkpoint(tmp_path / "a"), other, random_weights(other))
    # From one form into the other: nothing of the first stays.
    save_checkpoint(tmp_path / "b", config, random_weights(config))
    assert_same(convert(tmp_path / "b", tmp_path / "a", to="public", overwrite=True), config, random_weights(config))
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["config.yaml", "model.pt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]
    save_checkpoint(tmp_path / "new", config, random_weights(config), overwrite=True)  # nothing there: no matter


def test_missing_folders_are_made_and_removed_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    save_checkpoint(tmp_path / "some" / "new" / "a", config, random_weights(config))
    assert_same(load_checkpoint(tmp_path / "some" / "new" / "a"), config, random_weights(config))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save_checkpoint(tmp_path / "some" / "other" / "folder" / "a", config, random_weights(config))
    assert sorted(entry.name for entry in (tmp_path / "some").iterdir()) == ["new"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("a", "a"),
        ("a", "a/../a/"),
        ("a/model.pt", "a"),
        ("a", "link"),
        ("link", "a"),
        ("link/model.pt", "a"),
        ("run", "run"),
        ("run", "run/model"),
        ("run/model", "run"),
        ("a", "."),
    ],
)
def test_what_is_converted_is_not_replaced(tmp_path: Path, source: str, destination: str, overwrite: bool) -> None:
    """The trained weights beside the averaged ones would be lost."""
    config = tiny_config()
    (tmp_path / "a").mkdir()
    write_training_checkpoint(tmp_path / "a" / "model.pt", config, random_weights(config, 1), random_weights(config, 2))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    save_checkpoint(tmp_path / "run" / "model", config, random_weights(config))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as info:
        convert(tmp_path / source, tmp_path / destination, overwrite=overwrite)
    assert str(info.value) == (
        f"{tmp_path / destination}: would replace {tmp_path / source}, which is converted; expected another folder"
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    convert(tmp_path / source, tmp_path / "other", overwrite=overwrite)
    if (tmp_path / source).is_dir():
        convert(tmp_path / source, tmp_path / source / "inside", overwrite=overwrite)


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
    with pytest.raises(CheckpointError, match=r"file/new/a: .*file is a file, expected a folder"):
        save_checkpoint(tmp_path / "file" / "new" / "a", config, weights)
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

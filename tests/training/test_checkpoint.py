"""Checkpoints: whatever is cut, a complete one remains; what is damaged or of another recipe is refused."""

from __future__ import annotations

import json
import random
import shutil
import threading
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine.errors import CheckpointError, ConfigError
from pixelflow_training import checkpoint as module
from pixelflow_training import loop
from pixelflow_training.checkpoint import Checkpointer, name_of
from pixelflow_training.config import TrainConfig
from pixelflow_training.manifest import Manifest, read_manifest, verify
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep
from support.disk import Disk, PowerCut
from support.packs import FUZZ
from support.recipes import tiny_recipe
from support.runs import digest


class SmallState:
    """As much of a state as a checkpoint asks for: few tensors, so that few writes are to be cut."""

    def __init__(self, step: int = 0) -> None:
        self.step = step
        self.weight = torch.full((5, 3), float(step))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"model": {"weight": self.weight}, "counters": {"step": torch.tensor(self.step)}}

    def take_counters(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        self.step = int(tensors["counters"]["step"])


def save(folder: Path, config: TrainConfig, *steps: int) -> None:
    with Checkpointer(folder, config) as checkpoints:
        for step in steps:
            checkpoints.save(SmallState(step))  # type: ignore[arg-type]


def restored(folder: Path, config: TrainConfig, from_step: int | None = None) -> SmallState | None:
    state = SmallState()
    with Checkpointer(folder, config) as checkpoints:
        found = checkpoints.restore(state, from_step)  # type: ignore[arg-type]
    if not found:
        return None
    assert torch.equal(state.weight, SmallState(state.step).weight)
    return state


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_recipe(tmp_path, "checkpoint.keep=2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"


# --- what is kept ------------------------------------------------------------------------------------------


def test_a_whole_state_comes_back_bit_for_bit(tmp_path: Path, folder: Path) -> None:
    """Trained a little, so that nothing in it is what a fresh one has."""
    config = tiny_recipe(tmp_path, "steps=3", "checkpoint.every=3")
    loop.train(config, tmp_path / "trained", quiet=True)
    state = TrainState(config, loop.build_model(config))
    with Checkpointer(tmp_path / "trained" / "checkpoints", config) as checkpoints:
        assert checkpoints.restore(state)
        assert state.step == state.ema.step == 3
        assert {int(moments["step"]) for moments in state.optimizer.state.values()} == {3}
        assert all(bool((moments["exp_avg_sq"] > 0).any()) for moments in state.optimizer.state.values())
        assert (~state.history.tensor().isnan()).sum(1).tolist() == [3, 3]
    fresh = TrainState(config, loop.build_model(config))
    untouched = digest(fresh.tensors())
    with Checkpointer(folder, config) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        assert digest(fresh.tensors()) == untouched != digest(state.tensors())
        assert checkpoints.restore(fresh)
    assert digest(fresh.tensors()) == digest(state.tensors())
    assert fresh.seconds == state.seconds > 0


def test_the_state_of_the_step_is_saved_however_late_it_is_written(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, honest = threading.Event(), module._Writer.write_data

    def late(*arguments: Any) -> Any:
        assert go.wait(60)
        return honest(*arguments)

    monkeypatch.setattr(module._Writer, "write_data", late)
    state = SmallState(4)
    with Checkpointer(folder, config) as checkpoints:
        checkpoints.save(state)  # type: ignore[arg-type]
        checkpoints.is_written()  # does not wait
        assert checkpoints.steps() == []
        state.weight.fill_(-1)  # training goes on
        state.step = 5
        go.set()
        checkpoints.wait()
        assert checkpoints.steps() == [4]
    back = restored(folder, config)
    assert back is not None
    assert back.step == 4


def test_old_checkpoints_are_deleted_by_policy(tmp_path: Path, folder: Path) -> None:
    config = tiny_recipe(tmp_path, "checkpoint.keep=2", "checkpoint.keep_every=20")
    save(folder, config, *range(5, 61, 5))
    assert visible(folder) == ["latest", *(name_of(step) for step in (20, 40, 55, 60))]
    assert (folder / "latest").read_text() == "step-00000060\n"
    save(folder, tiny_recipe(tmp_path, "checkpoint.keep=1"), 65)
    assert visible(folder) == ["latest", name_of(65)]


def test_a_manifest_says_what_was_saved(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 7)
    manifest = read_manifest(folder / name_of(7))
    assert manifest.step == 7
    assert manifest.recipe == json.loads(json.dumps(config.to_dict()))
    assert manifest.versions["torch"] == torch.__version__
    assert sorted([*manifest.files, "manifest.json"]) == visible(folder / name_of(7))


def test_leftovers_are_deleted_and_nothing_else(folder: Path, config: TrainConfig) -> None:
    """A folder of this name may have been somebody's: its hidden files, such as a repository's, are not ours."""
    for name in (".git", ".step-00000004.partial", ".step-00000002.old", ".step-4.partial", ".latest.old.bak"):
        (folder / name).mkdir(parents=True)
        (folder / name / "HEAD").touch()
    (folder / ".latest.partial").touch()
    (folder / ".gitignore").touch()
    with Checkpointer(folder, config):
        assert visible(folder) == [".git", ".gitignore", ".latest.old.bak", ".step-4.partial"]


def test_no_checkpoint_is_no_error(folder: Path, config: TrainConfig) -> None:
    assert restored(folder, config) is None


# --- cut at every operation --------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
def test_a_save_cut_at_any_operation_leaves_a_valid_checkpoint(
    tmp_path: Path, folder: Path, config: TrainConfig, power: bool
) -> None:
    save(folder, config, 1, 2)
    base = tmp_path / "base"
    shutil.copytree(folder.parent, base)
    with Disk(folder.parent) as disk:
        save(folder, config, 3)
    total = disk.count
    assert {"open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"} == set(disk.names)
    assert total > 40
    print(total, "OPS")
    seen = set()
    for cut in range(total + 1):
        shutil.rmtree(folder.parent)
        shutil.copytree(base, folder.parent)
        with Disk(folder.parent, cut) as disk:
            try:
                save(folder, config, 3)
                done = True
            except (PowerCut, RuntimeError):  # in this thread, or in the other
                done = False
        assert disk.dead != done
        if power:
            disk.lose()
        complete = [path for path in folder.glob("step-*") if path.is_dir()]
        for path in complete:
            verify(path, read_manifest(path))
        state = restored(folder, config)
        assert state is not None, f"cut at operation {cut}"
        assert state.step in ((3,) if done else (2, 3)), f"cut at operation {cut}"
        assert done == (cut == total)
        seen.add(state.step)
        if FUZZ > 1 or cut % 8 == 0:
            save(folder, config, 4)  # leftovers are in nobody's way
            assert visible(folder) == ["latest", name_of(state.step), name_of(4)]
    assert seen == {2, 3}


def test_a_save_that_is_complete_is_on_the_disk(tmp_path: Path, folder: Path) -> None:
    """Also where no older one is deleted afterwards, which would bring the folder's names to the disk as well."""
    config = tiny_recipe(tmp_path, "checkpoint.keep=9")
    with Disk(folder.parent) as disk:
        save(folder, config, 1, 2)
    disk.lose()
    state = restored(folder, config)
    assert state is not None
    assert state.step == 2


@pytest.mark.parametrize("power", [False, True], ids=["killed", "power cut"])
def test_going_back_cut_at_any_operation_leaves_a_valid_checkpoint(
    tmp_path: Path, folder: Path, config: TrainConfig, power: bool
) -> None:
    save(folder, config, 1, 2)
    base = tmp_path / "base"
    shutil.copytree(folder.parent, base)
    with Disk(folder.parent) as disk:
        restored(folder, config, from_step=1)
    for cut in range(disk.count):
        shutil.rmtree(folder.parent)
        shutil.copytree(base, folder.parent)
        with Disk(folder.parent, cut) as disk, pytest.raises(PowerCut):
            restored(folder, config, from_step=1)
        if power:
            disk.lose()
        state = restored(folder, config)
        assert state is not None, f"cut at operation {cut}"
        assert visible(folder)[0] == "latest"
        assert visible(folder)[-1] == name_of(state.step)


def test_the_first_save_cut_before_its_last_act_counts(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 3)
    (folder / "latest").unlink()
    state = restored(folder, config)
    assert state is not None
    assert state.step == 3


def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 2)
    with Disk(folder, how="full") as disk:
        save(folder, config, 3)
    shutil.rmtree(folder)
    save(folder, config, 2)
    for first in range(disk.count):
        with Checkpointer(folder, config) as checkpoints:
            with Disk(folder, first, "full"):
                checkpoints.save(SmallState(3))  # type: ignore[arg-type]
                with pytest.raises(OSError, match="could not be saved") as caught:
                    checkpoints.wait()
                assert str(caught.value) == (
                    f"{folder / name_of(3)}: the checkpoint could not be saved: [Errno 28] No space left on device; "
                    "the last one is step-00000002"
                )
            # The half-written one is gone: it took the room that is missing.
            assert [name for name in visible(folder) if name.endswith(".partial") and "step" in name] == []
        state = restored(folder, config)
        assert state is not None
        assert state.step == 2
        assert visible(folder) == ["latest", name_of(2)]


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    config = replace(config, checkpoint=replace(config.checkpoint, keep=1, keep_every=None))
    save(folder, config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_folder", refuse)
        with pytest.warns(RuntimeWarning, match=r"step-00000002: the old checkpoint could not be removed: .*denied"):
            save(folder, config, 3)
    assert visible(folder) == ["latest", name_of(2), name_of(3)]
    assert (state := restored(folder, config)) is not None
    assert state.step == 3
    save(folder, config, 4)
    assert visible(folder) == ["latest", name_of(4)]


def test_a_failed_save_stops_training_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room from step 4's checkpoint on: step 5 tells, though no save is due there."""
    config = tiny_recipe(tmp_path, "checkpoint.every=2", "eval_every=100")
    honest, begun = TrainStep.begin, []
    save_in_background, saves = module.async_save, []
    disk = Disk(tmp_path / "run" / "checkpoints", 0, "full")

    def kept(*arguments: Any, **options: Any) -> Any:
        saves.append(save_in_background(*arguments, **options))
        return saves[-1]

    def filling(self: TrainStep, *arguments: Any) -> Any:
        begun.append(self.state.step)
        wait(saves)
        if self.state.step == 3:
            disk.__enter__()
        return honest(self, *arguments)

    monkeypatch.setattr(module, "async_save", kept)
    monkeypatch.setattr(TrainStep, "begin", filling)
    try:
        with pytest.raises(OSError, match=r"step-00000004: .* No space left on device; the last one is step-00000002"):
            loop.train(config, tmp_path / "run", quiet=True)
    finally:
        disk.__exit__()
    assert begun == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    loop.train(config, tmp_path / "run", quiet=True)


# --- refused -----------------------------------------------------------------------------------------------


def test_any_flipped_bit_is_refused(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 1, 2)
    chosen = folder / name_of(2)
    generator = random.Random(seed := 3 if FUZZ == 1 else random.randrange(2**32))
    print(f"seed {seed}")
    for path in sorted(chosen.iterdir()):
        whole = path.read_bytes()
        for _ in range(25 * FUZZ):
            bit = generator.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(CheckpointError) as caught:
                restored(folder, config)
            assert str(caught.value).startswith(f"{path}: "), bit
            assert "--from-step (there is: 1)" in str(caught.value)
        path.write_bytes(whole)
    assert restored(folder, config) is not None


def test_nothing_of_a_damaged_checkpoint_is_loaded(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata is a pickle: it may not even be opened."""
    save(folder, config, 2)
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("loaded"))
    (folder / name_of(2) / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=r"\.metadata: not what was written"):
        restored(folder, config)


def test_missing_and_unknown_files_are_refused(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 2)
    chosen = folder / name_of(2)
    for path in sorted(chosen.iterdir()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{path.name}: missing"):
            restored(folder, config)
        path.write_bytes(data)
    (chosen / "more").touch()
    with pytest.raises(CheckpointError, match="more: not in manifest"):
        restored(folder, config)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_checkpoint_that_goes_away_while_it_is_read_is_named(
    folder: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A run that goes on deletes old ones while they are published, say; another machine may not see the files."""
    save(folder, config, 2)
    honest = module.verify

    def verify(chosen: Path, manifest: Manifest) -> None:
        honest(chosen, manifest)
        (chosen / name).unlink()

    monkeypatch.setattr(module, "verify", verify)
    said = rf"No such file .*{name}|metadata is None"  # the latter by torch 2.11
    with pytest.raises(CheckpointError, match=rf"step-00000002: was whole, .* loaded: .*({said})"):
        restored(folder, config)


def test_a_missing_checkpoint_is_not_replaced_by_an_older_one(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 1, 2)
    shutil.rmtree(folder / name_of(2))
    with pytest.raises(CheckpointError, match=r"step-00000002: missing; .*--from-step \(there is: 1\)"):
        restored(folder, config)
    state = restored(folder, config, from_step=1)
    assert state is not None
    assert (folder / "latest").read_text() == "step-00000001\n"


@pytest.mark.parametrize("text", ["", "step-2", "../elsewhere", "step-00000002/../step-00000001"])
def test_a_damaged_pointer_is_refused(folder: Path, config: TrainConfig, text: str) -> None:
    save(folder, config, 1, 2)
    (folder / "latest").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest: got .* --from-step \(there is: 1, 2\)"):
        restored(folder, config)
    assert restored(folder, config, from_step=2) is not None


def test_a_checkpoint_under_another_name_is_refused(folder: Path, config: TrainConfig) -> None:
    save(folder, config, 1)
    (folder / name_of(1)).rename(folder / name_of(9))
    with pytest.raises(CheckpointError, match="is of step 1"):
        restored(folder, config, from_step=9)


def test_going_back_deletes_what_lies_ahead(tmp_path: Path, folder: Path) -> None:
    config = tiny_recipe(tmp_path, "checkpoint.keep=4")
    save(folder, config, 1, 2, 3)
    restored(folder, config, from_step=2)
    assert visible(folder) == ["latest", name_of(1), name_of(2)]
    save(folder, config, 3)
    assert visible(folder) == ["latest", name_of(1), name_of(2), name_of(3)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "seed: got 1, the checkpoint has 0"),
        ("model.depth=2", "model.depth: got 2, the checkpoint has 1"),
        ("optimizer.betas=[0.9, 0.95]", r"optimizer.betas: got \[0.9, 0.95\], the checkpoint has \[0.9, 0.999\]"),
        ("data.augment.shift=0.0", "data.augment.shift: got 0.0, the checkpoint has 0.03"),
        ("data.crop=center", 'data.crop: got "center", the checkpoint has "random"'),
        ("data.max_pixels=9", "data.max_pixels: got 9"),  # other images would be skipped
        ("batch_size=9", "batch_size: got 9"),
        ("steps=20", "steps: got 20, the checkpoint has 10"),  # the cosine ends elsewhere
    ],
)
def test_another_recipe_is_refused_by_key(tmp_path: Path, folder: Path, override: str, message: str) -> None:
    save(folder, tiny_recipe(tmp_path), 2)
    with pytest.raises(ConfigError, match=f"written by another recipe: {message}"):
        restored(folder, tiny_recipe(tmp_path, override))


@pytest.mark.parametrize(
    "overrides",
    [
        ["log_every=3"],
        ["eval_every=2", "checkpoint.every=7", "checkpoint.keep_every=2"],
        ["guard.max_skipped=0", "guard.spike_factor=9.0"],
        ["data.workers=3", "data.max_skipped=5"],
        ["optimizer.schedule=constant", "steps=20"],
    ],
)
def test_keys_that_change_no_number_are_free(tmp_path: Path, folder: Path, overrides: list[str]) -> None:
    constant = [override for override in overrides if override.startswith("optimizer")]
    save(folder, tiny_recipe(tmp_path, *constant), 2)
    assert restored(folder, tiny_recipe(tmp_path, *overrides)) is not None

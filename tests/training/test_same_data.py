"""A run goes on with the files that it began with: others are noticed, named and refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixelflow_engine.errors import CheckpointError, ConfigError
from pixelflow_training import loop
from pixelflow_training.checkpoint import name_of
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import FolderSource, ShardSource
from pixelflow_training.data.listing import Listing, differences, listing_of
from pixelflow_training.manifest import Manifest, check_data, check_recipe, read_manifest
from support.pictures import photograph_tiles
from support.recipes import tiny_recipe
from support.runs import lines

FOLDER = [
    "model.in_channels=3",
    "model.out_channels=3",
    "model.num_classes=3",
    "data.name=folder",
    "data.held_out=4",
    "batch_size=4",
    "eval_every=100",
    "optimizer.schedule=constant",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of three photographs."""
    photograph_tiles(tmp_path / "images", classes=3, each=3)
    return tmp_path / "images"


def listing(tree: Path) -> Listing:
    return listing_of(FolderSource(tree, 3, 3, 10**6))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: None, None),
        (lambda tree: (tree / "class 1" / "notes.txt").touch(), None),
        (lambda tree: shutil.copy(tree / "class 0/000.JPEG", tree / "class 1/new.JPEG"), "class 1: got 4 images, "),
        (lambda tree: (tree / "class 2/001.JPEG").unlink(), "class 2: got 2 images, "),
        (lambda tree: (tree / "class 2/001.JPEG").rename(tree / "class 2/009.JPEG"), "class 2: got 3 images, "),
        (lambda tree: grow(tree / "class 0/001.JPEG"), "class 0: got 3 images, "),
    ],
    ids=["nothing", "something else", "added", "removed", "renamed", "changed"],
)
def test_a_folder_that_changed_is_named_by_its_class(
    tree: Path, change: Callable[[Path], object], said: str | None
) -> None:
    before = listing(tree)
    assert list(before) == ["class 0", "class 1", "class 2"]
    change(tree)
    found = differences(listing(tree), before)
    assert len(found) == (said is not None)
    if said:
        assert found[0].startswith(said)
        assert "the checkpoint has 3 images, " in found[0]


def test_classes_that_come_and_go_are_named(tree: Path) -> None:
    before = listing(tree)
    (tree / "class 1").rename(tree / "other")
    assert differences(listing(tree), before) == ["class 1 is missing", "other is new"]


def test_two_images_that_change_places_are_noticed(tree: Path) -> None:
    """As many, of as many bytes together."""
    grow(tree / "class 0/000.JPEG")
    before = listing(tree)
    one, two = tree / "class 0/000.JPEG", tree / "class 0/001.JPEG"
    shutil.move(one, tree / "kept")
    shutil.move(two, one)
    shutil.move(tree / "kept", two)
    assert one.stat().st_size != two.stat().st_size
    assert [line.split(":")[0] for line in differences(listing(tree), before)] == ["class 0"]


def shard(path: Path, tree: Path, labels: list[int]) -> None:
    with tarfile.open(path, "w") as archive:
        for i, (label, image) in enumerate(zip(labels, sorted(tree.rglob("*.JPEG")), strict=False)):
            for suffix, content in ((".jpg", image.read_bytes()), (".cls", str(label).encode())):
                info = tarfile.TarInfo(f"{i:03}{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_tars_are_named_and_an_image_of_another_class_is_another(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for name, labels in (("a.tar", [0, 1, 2]), ("b.tar", [2, 1])):
        shard(tmp_path / "tars" / name, tree, labels)
    before = listing_of(ShardSource(tmp_path / "tars", 3, 3, 10**6))
    assert [text.split(",")[0] for text in before.values()] == ["3 images", "2 images"]
    shard(tmp_path / "tars" / "b.tar", tree, [2, 0])
    shard(tmp_path / "tars" / "c.tar", tree, [0])
    found = differences(listing_of(ShardSource(tmp_path / "tars", 3, 3, 10**6)), before)
    assert [line[:6] for line in found] == ["b.tar:", "c.tar "]


class Numbers:
    """A source without a listing of its own."""

    def __init__(self, *labels: int) -> None:
        self.labels = torch.tensor(labels)

    def name(self, sample: int) -> str:
        return str(sample)

    def load(self, sample: int) -> Tensor:
        raise NotImplementedError


def test_of_other_sources_the_labels_are_compared() -> None:
    assert not differences(listing_of(Numbers(0, 1)), listing_of(Numbers(0, 1)))
    assert differences(listing_of(Numbers(0, 1, 1)), listing_of(Numbers(0, 1)))
    assert differences(listing_of(Numbers(1, 0)), listing_of(Numbers(0, 1)))


# --- a run -------------------------------------------------------------------------------------------------


def test_a_run_refuses_other_images_unless_it_is_told_to_accept_them(tree: Path, tmp_path: Path) -> None:
    def recipe(*overrides: str) -> TrainConfig:
        return tiny_recipe(tmp_path, *FOLDER, *overrides)

    run = tmp_path / "run"
    loop.train(recipe(f"data.path={tree}", "steps=1"), run, quiet=True)
    before = (run / "recipe.yaml").read_bytes()
    shutil.copy(tree / "class 0/000.JPEG", tree / "class 1/new.JPEG")
    with pytest.raises(ConfigError) as caught:
        loop.train(recipe(f"data.path={tree}", "steps=2"), run, quiet=True)
    checkpoint = run / "checkpoints" / name_of(1)
    assert str(caught.value).startswith(f"{checkpoint}: written with other images: class 1: got 4 images, ")
    assert "class 0" not in str(caught.value)
    assert str(caught.value).endswith("to continue with those that are there now, pass data.changed=accept")
    assert (run / "recipe.yaml").read_bytes() == before

    (tree / "class 1/new.JPEG").unlink()
    moved = tree.rename(tmp_path / "elsewhere")  # the same images in another place are the same images
    loop.train(recipe(f"data.path={moved}", "steps=2"), run, quiet=True)
    shutil.copy(moved / "class 0/000.JPEG", moved / "class 1/new.JPEG")
    accepting = recipe(f"data.path={moved}", "steps=3", "data.changed=accept")
    loop.train(accepting, run, quiet=True)
    loop.train(accepting, run, quiet=True, from_step=2)  # which is no other change
    told = [(line["step"], line["parts"]) for line in lines(run) if line["event"] == "data_changed"]
    ((step, (part,)),) = told
    assert step == 2
    assert part.startswith("class 1: got 4 images, ")
    loop.train(recipe(f"data.path={moved}", "steps=4"), run, quiet=True)  # which is then what it goes on with
    assert read_manifest(run / "checkpoints" / name_of(4)).data == listing(moved)


# --- checkpoints of earlier versions -----------------------------------------------------------------------


def manifest_of(recipe: dict[str, object], data: Listing | None = None) -> Manifest:
    return Manifest(format=1, step=2, recipe=recipe, versions={"torch": "2"}, files={}, data=data)


def test_a_manifest_without_a_listing_is_what_it_was_before_there_were_any(tmp_path: Path) -> None:
    contents = {"files": {}, "format": 1, "recipe": {"steps": 3}, "step": 2, "versions": {"torch": "2"}}
    digest = sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    text = json.dumps(contents | {"sha256": digest}, indent=1, sort_keys=True) + "\n"
    (tmp_path / "manifest.json").write_text(text)
    manifest = read_manifest(tmp_path)
    assert manifest == manifest_of({"steps": 3})
    assert manifest.render() == text
    check_data(tmp_path, manifest, {"class 0": "anything"}, "refuse")
    changed = manifest_of({"steps": 3}, {"class 0": "4 images"}).render()
    assert '"data": {\n  "class 0": "4 images"' in changed
    (tmp_path / "manifest.json").write_text(changed.replace("4 images", "5 images"))
    with pytest.raises(CheckpointError, match="not what was written"):
        read_manifest(tmp_path)


def test_a_key_that_the_checkpoint_does_not_know_has_its_default(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path).to_dict()
    known = json.loads(json.dumps(recipe))
    del known["data"]["crop"], known["data"]["changed"], known["guard"], known["model"]["patch_size"]
    check_recipe(tmp_path, manifest_of(known), tiny_recipe(tmp_path))
    with pytest.raises(ConfigError, match=r'data\.crop: got "center", the checkpoint has "random"$'):
        check_recipe(tmp_path, manifest_of(known), tiny_recipe(tmp_path, "data.crop=center"))
    with pytest.raises(ConfigError, match=r"old_key: not known to this version, the checkpoint has 3$"):
        check_recipe(tmp_path, manifest_of(known | {"old_key": 3}), tiny_recipe(tmp_path))


def test_without_a_listing_another_path_is_another_recipe(tmp_path: Path) -> None:
    config, moved = (tiny_recipe(tmp_path, *FOLDER, f"data.path={name}") for name in ("here", "there"))
    saved = json.loads(json.dumps(config.to_dict()))
    check_recipe(tmp_path, manifest_of(saved, {"class 0": "4 images"}), moved)
    with pytest.raises(ConfigError, match=r'data\.path: got "there", the checkpoint has "here"$'):
        check_recipe(tmp_path, manifest_of(saved), moved)


def test_a_great_difference_is_told_in_few_words(tmp_path: Path) -> None:
    before = {f"class {i}": "1 images" for i in range(9)}
    with pytest.raises(ConfigError, match=r"class 0 is missing; .*class 4 is missing; and 4 more; to continue"):
        check_data(tmp_path, manifest_of({}, before), {}, "refuse")

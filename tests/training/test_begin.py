"""How runs begin: with the weights of a checkpoint in any form, and on from what earlier versions have left."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pixelflow_engine import convert, load_checkpoint, save_checkpoint
from pixelflow_engine.errors import CheckpointError, ConfigError
from pixelflow_training import loop
from pixelflow_training.config import TrainConfig, load_config
from pixelflow_training.manifest import Manifest, check_recipe, plain
from pixelflow_training.publish import publish
from support.recipes import tiny_recipe
from support.reference_models import randomize, seeded
from support.runs import digest, outcome, state_of

SHORT = ["steps=2", "data.held_out=10", "checkpoint.keep=5", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_recipe(folder, *SHORT)
    loop.train(config, folder / "run", quiet=True)
    return config, folder / "run"


# --- weights of a checkpoint -------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_that_it_is_told(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, *SHORT)
    model = loop.build_model(config)
    randomize(model, seeded(4))
    save_checkpoint(tmp_path / "source", config.network, {k: v.bfloat16() for k, v in model.state_dict().items()})
    begun = tiny_recipe(tmp_path, *SHORT, f"init_from={tmp_path / 'source'}")
    loop.train(begun, tmp_path / "run", quiet=True)
    first = publish(tmp_path / "run", tmp_path / "first", from_step=0)
    for weights in ("model", "ema"):
        begins = load_checkpoint(first, weights).state_dict
        for name, value in model.state_dict().items():
            assert torch.equal(begins[name], value.bfloat16().float()), name
    # And goes on where its source is gone, to the same bits.
    shutil.rmtree(tmp_path / "source")
    whole = outcome(tmp_path / "run", begun)
    loop.train(begun, tmp_path / "run", quiet=True, from_step=1)
    assert outcome(tmp_path / "run", begun) == whole


@pytest.mark.parametrize("form", ["run", "model", "published", "training", "safetensors"])
def test_any_form_will_do(form: str, trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, run = trained
    match form:
        case "run":
            source = run
        case "model":
            source = run / "model"
        case "published":
            source = tmp_path / "published"
            convert(run, source, to="public")
        case "training":
            source = publish(run, tmp_path / "training")
        case _:
            source = tmp_path / "ours"
            convert(run, source)
    begun = tiny_recipe(tmp_path, *SHORT, f"init_from={source}")
    model = loop.build_model(begun)
    loop.take_first_weights(model, begun)
    assert digest({"": model.state_dict()}) == digest({"": state_of(run, config).ema.model.state_dict()})


def test_stages_and_resolution_may_be_others(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    begun = tiny_recipe(tmp_path, f"init_from={trained[1]}", "resolution=32", "scheduler.num_stages=3")
    model = loop.build_model(begun)
    loop.take_first_weights(model, begun)
    assert torch.equal(model.patch_embed.proj.weight, load_checkpoint(trained[1]).state_dict["patch_embed.proj.weight"])


def test_another_model_is_refused_key_by_key_before_anything_is_written(
    trained: tuple[TrainConfig, Path], tmp_path: Path
) -> None:
    begun = tiny_recipe(tmp_path, f"init_from={trained[1]}", "model.depth=2", "model.num_classes=11")
    with pytest.raises(ConfigError) as caught:
        loop.train(begun, tmp_path / "run", quiet=True)
    said = "model.depth: got 2, the checkpoint has 1; model.num_classes: got 11, the checkpoint has 10"
    assert str(caught.value) == f"init_from: {trained[1]} is of another model: {said}"
    with pytest.raises(CheckpointError, match="no such file or folder"):
        loop.train(tiny_recipe(tmp_path, "init_from=nowhere"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_where_a_run_began_is_part_of_it(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='init_from: got "elsewhere", the checkpoint has null'):
        loop.train(tiny_recipe(tmp_path, *SHORT, "init_from=elsewhere"), trained[1], quiet=True)


# --- what earlier versions have left -----------------------------------------------------------------------

NEW = ("init_from", "loggers", "samples", "compute", "data.workers", "data.crop", "data.augment.flip")


def without(recipe: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A recipe as a version wrote it that did not know these keys."""
    recipe = json.loads(json.dumps(recipe))
    for key in keys:
        *parents, last = key.split(".")
        group = recipe
        for parent in parents:
            group = group[parent]
        del group[last]
    return recipe


def manifest_of(recipe: dict[str, Any]) -> Manifest:
    return Manifest(format=1, step=0, recipe=recipe, versions={}, files={})


def test_a_recipe_of_an_earlier_version_has_the_defaults(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path)
    earlier = manifest_of(without(plain(config), *NEW))
    check_recipe(tmp_path, earlier, config)
    with pytest.raises(ConfigError, match=r'data\.crop: got "center", the checkpoint has "random"$'):
        check_recipe(tmp_path, earlier, tiny_recipe(tmp_path, "data.crop=center"))


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [(None, "curriculum", 1), ("data", "mixup", 0), ("compute", "float8", True), ("guard", "patience", None)],
)
def test_a_recipe_of_a_later_version_is_refused(tmp_path: Path, group: str | None, key: str, value: object) -> None:
    """What an unknown key does is not known either: also in a group whose known keys are free, and without a value."""
    config = tiny_recipe(tmp_path)
    recipe = plain(config)
    saved = recipe | ({key: value} if group is None else {group: recipe[group] | {key: value}})
    name = key if group is None else f"{group}.{key}"
    said = f"{name}: not known to this version, the checkpoint has {json.dumps(value)}"
    with pytest.raises(ConfigError, match=re.escape(said) + "$"):
        check_recipe(tmp_path, manifest_of(saved), config)


def test_a_run_of_an_earlier_version_goes_on(
    trained: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifests and its recipe lack the keys that came later."""
    config, _ = trained
    with monkeypatch.context() as patch:
        patch.setattr("pixelflow_training.manifest.plain", lambda c: without(plain(c), *NEW))
        loop.train(config, tmp_path / "run", quiet=True)
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    assert "samples" not in manifest["recipe"]
    loop.train(config, tmp_path / "run", quiet=True, from_step=1)
    assert outcome(tmp_path / "run", config) == outcome(trained[1], config)
    assert load_config(str(tmp_path / "run" / "recipe.yaml")) == config

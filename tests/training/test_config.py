"""Recipes: what ships loads, a wrong type is named, a value out of range is refused before anything is trained."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pixelflow_engine.errors import ConfigError
from pixelflow_training.cli import train
from pixelflow_training.config import (
    DataConfig,
    GuardConfig,
    OptimizerConfig,
    SamplesConfig,
    TrainConfig,
    load_config,
    recipe_path,
)
from support.recipes import TINY_RECIPE, tiny_recipe

RECIPES = sorted(
    entry.name.removesuffix(".yaml")
    for entry in (resources.files("pixelflow_training") / "recipes").iterdir()
    if entry.name.endswith(".yaml")
)

DIGITS = [name for name in RECIPES if name.startswith("digits")]


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# --- what loads --------------------------------------------------------------------------------------------


def test_the_documented_recipes_ship() -> None:
    assert RECIPES == ["digits", "digits-two-minutes", "smoke", "xl-imagenet256"]


def test_help_names_them() -> None:
    output = re.sub(r"[│\s]+", " ", CliRunner().invoke(train, ["--help"]).output)
    assert f"or a recipe: {', '.join(RECIPES)}." in output


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_by_name_and_by_path(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config == load_config(written(tmp_path, recipe_path(name).read_bytes()))
    assert config.network.model.num_classes == (1000 if "imagenet" in name else 10)


def test_the_large_recipe_is_the_published_configuration() -> None:
    """As its authors' ``pixelflow_xl_c2i.yaml`` and ``train.py`` have it, in our names."""
    config = load_config("xl-imagenet256", ["data.path=imagenet"])
    model, optimizer, data = config.model, config.optimizer, config.data
    assert (model.num_attention_heads, model.attention_head_dim, model.depth, model.patch_size) == (16, 72, 28, 4)
    assert (model.in_channels, model.out_channels, model.num_classes, model.attention_bias) == (3, 3, 1000, True)
    assert (config.scheduler.num_train_timesteps, config.scheduler.num_stages, config.resolution) == (1000, 4, 256)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas) == (1e-4, 0, (0.9, 0.999))
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.max_grad_norm) == ("constant", 0, 1)
    assert (data.name, data.path, data.crop, data.augment.flip) == ("folder", "imagenet", "random", True)
    assert (data.augment.rotate, data.augment.scale, data.augment.shift) == (0, 0, 0)
    assert (config.ema_decay, config.label_drop, config.seed) == (0.9999, 0.1, 42)


def test_the_short_recipe_makes_half_the_resolution_much_sooner() -> None:
    short, long = load_config("digits-two-minutes"), load_config("digits")
    assert short.network.model == long.network.model
    assert (long.resolution, long.scheduler.num_stages) == (32, 3)
    assert (short.resolution, short.scheduler.num_stages) == (16, 2)
    assert short.steps * short.batch_size < long.steps * long.batch_size / 5


@pytest.mark.parametrize("name", DIGITS)
def test_a_recipe_keeps_out_the_digits_that_the_evaluation_holds_out(name: str) -> None:
    """The evaluation takes the default split: any other would judge a model by digits that it was trained on."""
    data, default = load_config(name).data, DataConfig()
    assert (data.name, data.held_out, data.split_seed) == (default.name, default.held_out, default.split_seed)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_directorys_recipe_reads_back(name: str, tmp_path: Path) -> None:
    config = load_config(name, ["optimizer.betas=[0.5, 0.75]", "model.cross_attention_dim=null"])
    assert load_config(written(tmp_path, yaml.safe_dump(config.to_dict(), sort_keys=False))) == config


def test_the_bundled_models_recipe_loads() -> None:
    """It is the one that its README names, with the override of the command there."""
    folder = Path(str(resources.files("pixelflow_engine"))) / "assets" / "digits"
    assert load_config(str(folder / "recipe.yaml")) == load_config("digits", ["compute.compile=true"])


@pytest.mark.parametrize("name", DIGITS)
def test_digits_are_not_mirrored(name: str) -> None:
    assert not load_config(name).data.augment.flip


def test_overrides_are_typed(tmp_path: Path) -> None:
    config = tiny_recipe(
        tmp_path,
        "steps=77",
        "optimizer.lr=1e-4",  # a string in YAML 1.1
        "optimizer.weight_decay=1",  # an integer where a float belongs
        "optimizer.betas=[0.8, 0.95]",
        "data.augment.rotate=12.5",
        "model.attention_bias=false",
        "optimizer.schedule=constant",
        "seed=5",
        "seed=6",  # the last one counts
    )
    plain = tiny_recipe(tmp_path)
    assert (config.steps, config.seed) == (77, 6)
    assert config.optimizer.lr == 1e-4
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.optimizer.betas == (0.8, 0.95)
    assert config.data.augment == replace(plain.data.augment, rotate=12.5)
    assert config.model == replace(plain.model, attention_bias=False)
    assert config.optimizer.schedule == "constant"


def test_an_override_may_make_a_group(tmp_path: Path) -> None:
    recipe = written(tmp_path, "model: {num_attention_heads: 1, attention_head_dim: 4, depth: 1}\n")
    config = load_config(recipe, ["data.augment.shift=0.25", "scheduler.num_stages=2"])
    assert config.data.augment.shift == 0.25
    assert config.network.scheduler.num_stages == 2
    assert config.network.resolution == 256


def test_overrides_stay_with_their_call() -> None:
    before = load_config("digits")
    assert load_config("digits", ["steps=1", "data.augment.rotate=0"]) != before
    assert load_config("digits") == before


# --- what is refused ---------------------------------------------------------------------------------------


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        tiny_recipe(folder, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "known"),
    [
        ("learning_rate=1", "learning_rate", "optimizer"),
        ("optimizer.learning_rate=1", "learning_rate", "lr"),
        ("data.augment.mirror=1", "mirror", "rotate"),
        ("scheduler.stages=3", "stages", "num_stages"),
        ("model.heads=3", "heads", "num_attention_heads"),
        ("3=4", "3", "steps"),
    ],
)
def test_an_unknown_key_is_named_beside_the_known_ones(override: str, key: str, known: str, tmp_path: Path) -> None:
    message = refused(tmp_path, override)
    assert re.search(rf"unknown keys {key}\b", message), message
    assert known in message


@pytest.mark.parametrize(
    ("override", "key", "got", "expected"),
    [
        ("steps=many", "steps", "'many'", "an integer"),
        ("steps=1.5", "steps", "1.5", "an integer"),
        ("steps=true", "steps", "True", "an integer"),
        ("steps=null", "steps", "None", "an integer"),
        ("batch_size=[8]", "batch_size", "[8]", "an integer"),
        ("ema_decay=high", "ema_decay", "'high'", "a number"),
        ("ema_decay=true", "ema_decay", "True", "a number"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan", "a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr", "inf", "a finite number"),
        ("samples.guidance_scale=.nan", "samples.guidance_scale", "nan", "a finite number"),
        ("samples.guidance_scale=nan", "samples.guidance_scale", "nan", "a finite number"),
        ("optimizer.betas=0.9", "optimizer.betas", "0.9", "a list, such as [0.9]"),
        ("optimizer.betas=[0.9, x]", "optimizer.betas[1]", "'x'", "a number"),
        ("optimizer.schedule=linear", "optimizer.schedule", "'linear'", "constant, cosine"),
        ("data.name=faces", "data.name", "'faces'", "digits, folder, shards"),
        ("data.crop=left", "data.crop", "'left'", "random, center"),
        ("data.workers=1.5", "data.workers", "1.5", "an integer"),
        ("model.attention_bias=1", "model.attention_bias", "1", "bool"),
        ("model=3", "model", "int", "a mapping"),
        ("optimizer=[]", "optimizer", "list", "a mapping"),
        ("data.augment=null", "data.augment", "None", "a mapping"),
        ("data.augment.flip=1", "data.augment.flip", "1", "bool"),
    ],
)
def test_a_wrong_type_is_named(override: str, key: str, got: str, expected: str, tmp_path: Path) -> None:
    message = refused(tmp_path, override)
    assert message.startswith(f"recipe.{key}: got {got}"), "the file is not at fault, and is not named"
    assert expected in message.partition("expected")[2]


@pytest.mark.parametrize(
    "override", ["steps", "", "=3", ".steps=3", "steps.=3", "optimizer..lr=3", "steps.x=3", "model.depth.x=3"]
)
def test_a_malformed_override_is_quoted(override: str, tmp_path: Path) -> None:
    message = refused(tmp_path, override)
    assert message.startswith("override:"), message
    assert repr(override) in message


@pytest.mark.parametrize("override", ["steps=[1", "steps={", "steps='1", "steps=*x", "steps=1: 2: 3"])
def test_an_override_whose_value_is_not_yaml_is_quoted(override: str, tmp_path: Path) -> None:
    message = refused(tmp_path, override)
    assert message.startswith("override:"), message
    assert repr(override) in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 5\n", ["missing keys model"]),
        ("model: {depth: 1}\n", ["model", "missing keys num_attention_heads, attention_head_dim"]),
        ("", ["NoneType", "a mapping"]),
        ("- model\n", ["list", "a mapping"]),
        ("model: [1\n", ["not YAML"]),
        (b"model: \xff\xfe\n", ["not YAML"]),
        ("model: !!python/object/apply:os.getcwd []\n", ["not YAML"]),
    ],
)
def test_a_file_that_is_no_recipe(text: str | bytes, said: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    for part in ["recipe.yaml", *said]:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["", "- model\n", "model\n"])
def test_an_override_of_a_file_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(written(tmp_path, text), ["steps=1"])


@pytest.mark.parametrize("name", ["digit", "digits.yaml", "no/such/file.yaml", ""])
def test_a_recipe_that_is_not_found_lists_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert repr(name) in str(caught.value)
    for recipe in RECIPES:
        assert recipe in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "key", "got"),
    [
        (["steps=0"], "steps", "0"),
        (["log_every=0"], "log_every", "0"),
        (["eval_every=-1"], "eval_every", "-1"),
        (["checkpoint.every=0"], "checkpoint.every", "0"),
        (["checkpoint.keep=0"], "checkpoint.keep", "0"),  # the one to go on from would be deleted
        (["checkpoint.keep_every=0"], "checkpoint.keep_every", "0"),
        (["guard.max_skipped=-1"], "guard.max_skipped", "-1"),
        (["guard.spike_factor=0.5"], "guard.spike_factor", "0.5"),  # half of all losses
        (["batch_size=1"], "batch_size", "1"),  # two stages need two images
        (["ema_decay=1.1"], "ema_decay", "1.1"),
        (["ema_decay=-0.1"], "ema_decay", "-0.1"),
        (["label_drop=1.1"], "label_drop", "1.1"),
        (["label_drop=-0.1"], "label_drop", "-0.1"),
        (["seed=-1"], "seed", "-1"),
        (["resolution=20"], "resolution", "20"),
        (["model.dropout=0.1"], "model.dropout", "0.1"),
        (["model.cross_attention_dim=8"], "model.cross_attention_dim", ""),
        (["model.depth=0"], "model.depth", "0"),
        (["data.augment.scale=1.0"], "data.augment.scale", "1.0"),  # would shrink an image to nothing
        (["data.workers=-1"], "data.workers", "-1"),
        (["data.split_seed=99999999999999999999"], "data.split_seed", "99999999999999999999"),
        ([f"data.split_seed={-(2**63) - 1}"], "data.split_seed", str(-(2**63) - 1)),
        (["data.max_pixels=0"], "data.max_pixels", "0"),
        (["data.max_pixels=89478486"], "data.max_pixels", "89478486"),  # Pillow would refuse it by itself
        (["data.max_skipped=-1"], "data.max_skipped", "-1"),
        (["data.path=somewhere"], "data.path", "'somewhere'"),  # that the digits would not be read from
        (["data.name=folder", "model.in_channels=4", "model.out_channels=4"], "model.in_channels", "4"),
        (["optimizer.lr=-0.001"], "optimizer.lr", "-0.001"),
        (["optimizer.weight_decay=-0.1"], "optimizer.weight_decay", "-0.1"),
        (["optimizer.betas=[0.9]"], "optimizer.betas", "0.9"),
        (["optimizer.betas=[0.9, 0.99, 0.999]"], "optimizer.betas", "0.99"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas", "1.0"),
        (["optimizer.warmup_steps=-1"], "optimizer.warmup_steps", "-1"),
        (["optimizer.max_grad_norm=0"], "optimizer.max_grad_norm", "0"),
        (["optimizer.max_grad_norm=-1"], "optimizer.max_grad_norm", "-1"),  # would climb instead of descend
        (["optimizer.lr=1e400"], "optimizer.lr", "inf"),
        # The smallest stage, 3 x 3 pixels, cannot be halved for its training pair.
        (["model.patch_size=1", "resolution=6"], "resolution", "6"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_value_out_of_range_is_named(overrides: list[str], key: str, got: str, tmp_path: Path) -> None:
    message = refused(tmp_path, *overrides)
    assert key in message
    assert got in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("group", "key"),
    [
        (OptimizerConfig, "lr"),
        (OptimizerConfig, "weight_decay"),
        (OptimizerConfig, "max_grad_norm"),
        (GuardConfig, "spike_factor"),
        (SamplesConfig, "guidance_scale"),
    ],
)
def test_a_recipe_made_in_python_has_finite_numbers(group: Any, key: str, value: float) -> None:
    """As one from YAML: the run's recipe.yaml could not be read otherwise."""
    with pytest.raises(ConfigError, match=rf"\b{key}: got {value}, expected a finite number"):
        group(**{key: value})


def test_the_tiny_recipe_is_as_written(tmp_path: Path) -> None:
    """The tests of training rest on it: keys that nothing reads would go unnoticed."""
    config = tiny_recipe(tmp_path)
    assert isinstance(config, TrainConfig)

    def hold(got: Any, written: Any) -> None:
        if not isinstance(written, dict):
            assert got == written
            return
        for key, value in written.items():
            hold(got[key], value)

    hold(config.to_dict(), yaml.safe_load(TINY_RECIPE))


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """YAML's own reader keeps the last one: a group appended to a recipe would silently replace the first."""
    text = "model: {num_attention_heads: 1, attention_head_dim: 8, depth: 1}\noptimizer: {lr: 1.0e-3}\n"
    load_config(written(tmp_path, text))
    with pytest.raises(ConfigError, match="the key 'optimizer' occurs twice"):
        load_config(written(tmp_path, text + "optimizer: {warmup_steps: 3}\n"))


def test_more_stages_than_training_pairs_are_made_for_are_refused(tmp_path: Path) -> None:
    assert "scheduler.num_stages: got 7, expected at most 6 for training" in refused(
        tmp_path, "scheduler.num_stages=7", "resolution=1024", "batch_size=8"
    )

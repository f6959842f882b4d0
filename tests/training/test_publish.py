"""Runs as checkpoints: by their directory everywhere, in the published form, and never by their pickles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pixelflow_engine import PixelFlowEngine, convert, load_checkpoint
from pixelflow_engine.cli import app
from pixelflow_engine.errors import CheckpointError
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_training import loop
from pixelflow_training.cli import train
from pixelflow_training.config import TrainConfig
from pixelflow_training.publish import publish
from support.recipes import tiny_recipe
from support.runs import digest, state_of

OVERRIDES = ["steps=3", "data.held_out=10", "eval_every=3", "checkpoint.every=1", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_recipe(folder, *OVERRIDES)
    loop.train(config, folder / "run", quiet=True)
    return config, folder / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bits(weights: dict[str, torch.Tensor]) -> str:
    return digest({"": weights})


# --- the published form ------------------------------------------------------------------------------------


def test_both_sets_of_weights_come_back_bit_by_bit(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, run = trained
    before = files(run)
    (run / "checkpoints" / ".step-00000004.partial").mkdir()  # of a save under way, which is not to be tidied up
    published = publish(run, tmp_path / "out")
    assert published == tmp_path / "out" / "model_3.pt"
    assert (run / "checkpoints" / ".step-00000004.partial").exists()
    (run / "checkpoints" / ".step-00000004.partial").rmdir()
    assert files(run) == before, "the run is only read"
    state = state_of(run, config)
    for weights, model in (("model", state.model), ("ema", state.ema.model)):
        checkpoint = load_checkpoint(published, weights)
        assert checkpoint.config == config.network
        assert bits(checkpoint.state_dict) == bits(model.state_dict())
        # And through our own form and the published one again.
        convert(published, tmp_path / weights, weights=weights)
        convert(tmp_path / weights, tmp_path / f"{weights} again", to="public")
        assert bits(load_checkpoint(tmp_path / f"{weights} again").state_dict) == bits(model.state_dict())
    assert bits(load_checkpoint(published).state_dict) == bits(load_checkpoint(run).state_dict)
    assert bits(state.model.state_dict()) != bits(state.ema.model.state_dict())


def test_it_is_what_the_published_code_writes(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    """A dict of two state dicts that load strictly by the published names; data alone, by torch's own reader."""
    content = torch.load(publish(trained[1], tmp_path / "out"), weights_only=True)
    assert sorted(content) == ["ema", "model"]
    m = trained[0].model
    for weights in content.values():
        model = PixelFlowTransformer(
            depth=m.depth,
            num_attention_heads=m.num_attention_heads,
            attention_head_dim=m.attention_head_dim,
            in_channels=m.in_channels,
            out_channels=m.out_channels,
            patch_size=m.patch_size,
            num_classes=m.num_classes,
            attention_bias=m.attention_bias,
        )
        model.load_state_dict(weights, strict=True)
        assert [*weights] == [*model.state_dict()]


def test_any_checkpoint_of_a_run_can_be_published(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    first = publish(trained[1], tmp_path / "out", from_step=0)
    assert bits(load_checkpoint(first, "model").state_dict) == bits(loop.build_model(trained[0]).state_dict())
    with pytest.raises(CheckpointError, match="exists already, and overwrite"):
        publish(trained[1], tmp_path / "out")
    publish(trained[1], tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.yaml", "model_3.pt"}
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match=r"not replaced, because it also holds mine\.txt"):
        publish(trained[1], tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match=r"step-00000009: missing; .*\(there is: 0, 1, 2, 3\)"):
        publish(trained[1], tmp_path / "other", from_step=9)


def test_a_sharded_run_is_published_by_one_process(tmp_path: Path) -> None:
    """Its recipe asks for two; its checkpoints are the same whoever reads them."""
    loop.train(tiny_recipe(tmp_path, *OVERRIDES), tmp_path / "run", quiet=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("shard: 1", "shard: 2"))
    assert publish(tmp_path / "run", tmp_path / "out").is_file()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: missing; expected the directory of a run"):
        publish(tmp_path, tmp_path / "out")
    tiny_recipe(tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / "recipe.yaml")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            publish(tmp_path, tmp_path / "out")
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
    assert not (tmp_path / "out").exists()


def test_the_command(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(train, ["publish", str(trained[1]), str(tmp_path / "out"), "--from-step", "2"])
    assert done.exit_code == 0, done.output
    assert done.output.split() == ["wrote", str(tmp_path / "out" / "model_2.pt")]
    arguments = ["generate", "--model", str(tmp_path / "out" / "model_2.pt"), "--class-label", "3", "--steps", "1"]
    done = CliRunner().invoke(app, [*arguments, "--quiet", "--output", str(tmp_path / "three.png")])
    assert done.exit_code == 0, done.output


# --- run directories as checkpoints ------------------------------------------------------------------------


def test_a_run_directory_is_its_averaged_model(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, run = trained
    checkpoint = load_checkpoint(run)
    assert bits(checkpoint.state_dict) == bits(state_of(run, config).ema.model.state_dict())
    assert PixelFlowEngine.from_pretrained(run).config == config.network
    done = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "out"), "--to", "public"])
    assert done.exit_code == 0, done.output
    assert bits(load_checkpoint(tmp_path / "out").state_dict) == bits(checkpoint.state_dict)
    with pytest.raises(CheckpointError, match="no training checkpoint: use 'auto'"):
        load_checkpoint(run, "model")


def test_a_run_without_a_model_yet_says_so(trained: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((trained[1] / "recipe.yaml").read_bytes())
    with pytest.raises(CheckpointError, match="a run without a model yet: its first evaluation writes one"):
        load_checkpoint(tmp_path)


def test_checkpoints_to_go_on_from_are_never_read_as_models(trained: tuple[TrainConfig, Path]) -> None:
    folder = trained[1] / "checkpoints" / "step-00000003"
    assert (folder / ".metadata").is_file()
    with pytest.raises(CheckpointError, match=r"never read as a model: its metadata is a pickle, .* publish"):
        load_checkpoint(folder)

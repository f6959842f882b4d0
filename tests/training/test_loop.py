"""The training loop: what it writes, that it repeats to the last bit, and that its gradient is the reference's."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pixelflow_engine import PixelFlowEngine, load_checkpoint
from pixelflow_engine.config import PixelFlowConfig
from pixelflow_engine.errors import ConfigError
from pixelflow_engine.layers import unpatchify
from pixelflow_engine.model import PackedTransformer
from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_engine.reference.training import loss as reference_loss
from pixelflow_training import evaluation, loop, watch
from pixelflow_training.collate import Batch
from pixelflow_training.config import DataConfig, OptimizerConfig, TrainConfig, load_config
from pixelflow_training.data import ImageSet, load_digits
from pixelflow_training.plan import Plan, plan_step
from pixelflow_training.step import TrainStep, batch_losses, stage_means, stage_sums
from support.recipes import tiny_recipe
from support.reference_models import randomize, seeded

Record = dict[str, Any]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """Ten steps of a tiny model: the recipe and the run directory."""
    folder = tmp_path_factory.mktemp("ten steps")
    config = tiny_recipe(folder)
    loop.train(config, folder / "run", quiet=True)
    return config, folder / "run"


def not_json(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def records(folder: Path) -> list[Record]:
    """The lines of a log, as strict JSON: Python's own reader would let NaN pass."""
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=not_json) for line in text.splitlines()]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_checkpoint(folder).state_dict.items()}


# --- what a run leaves -------------------------------------------------------------------------------------


def test_a_run_leaves_a_recipe_a_log_and_a_model(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert sorted(name for name in files if not name.startswith("checkpoints/")) == [
        "log.jsonl", "model/config.json", "model/model.safetensors", "recipe.yaml",
    ]  # fmt: skip
    assert load_config(str(folder / "recipe.yaml")) == config


def test_the_log_is_json_with_finite_losses(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    lines = records(folder)
    trained = [line for line in lines if line["event"] == "train"]
    held_out = [line for line in lines if line["event"] == "held_out"]
    assert len(lines) == len(trained) + len(held_out)
    assert [line["step"] for line in trained] == list(range(1, 11))
    assert [line["step"] for line in held_out] == [5, 10]
    for line in trained:
        assert set(line) == {
            "event", "step", "loss", "stage_loss", "grad_norm", "lr",
            "images_per_second", "tokens_per_second", "flops_per_second", "seconds",
        }  # fmt: skip
        assert math.isfinite(line["loss"])
        assert 0 < line["loss"] < 100
        assert line["grad_norm"] > 0
        # Four images on each of two stages: the loss is the mean of the stages' means.
        assert np.mean(line["stage_loss"]) == pytest.approx(line["loss"], rel=1e-6)
        assert line["lr"] == pytest.approx(loop.learning_rate(config.optimizer, line["step"] - 1, config.steps))
        # Four images of 4 tokens and four of 16.
        assert line["tokens_per_second"] / line["images_per_second"] == pytest.approx(10)
    for line in held_out:
        assert len(line["stage_loss"]) == 2
        assert all(0 < loss < 100 for loss in line["stage_loss"])
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_the_log_is_json_even_where_a_stage_has_no_held_out_image(
    recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    loop.train(recipe("data.held_out=1", "steps=1"), tmp_path / "run", quiet=True)
    records(tmp_path / "run")


def test_the_model_loads_in_the_engine(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    engine = PixelFlowEngine.from_pretrained(folder / "model")
    assert engine.config == config.network
    images = engine([0, 9, 10], num_inference_steps=2, output_type="np").images
    assert isinstance(images, np.ndarray)
    assert images.shape == (3, 16, 16, 1)
    assert np.isfinite(images).all()
    assert len({image.tobytes() for image in images}) == 3


def test_the_log_is_written_as_it_happens(
    recipe: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = TrainStep.begin, []

    def looking(self: TrainStep, *arguments: Any) -> Any:
        seen.append([(line["event"], line["step"]) for line in records(tmp_path / "run")] if self.state.step else [])
        return honest(self, *arguments)

    monkeypatch.setattr(TrainStep, "begin", looking)
    loop.train(recipe("steps=3", "eval_every=2"), tmp_path / "run", quiet=True)
    assert seen == [[], [("train", 1)], [("train", 1), ("train", 2), ("held_out", 2)]]


def test_training_returns_the_folder_of_the_model(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    assert loop.train(recipe("steps=1"), output, quiet=True) == output / "model"
    assert load_checkpoint(output / "model").config == recipe().network


def test_quiet_is_quiet(recipe: Callable[..., TrainConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loop.train(recipe("steps=2"), tmp_path / "run", quiet=True)
    assert capfd.readouterr() == ("", "")


# --- the same again ----------------------------------------------------------------------------------------


def without_times(lines: list[Record]) -> list[Record]:
    times = ("images_per_second", "tokens_per_second", "flops_per_second", "seconds")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def test_the_same_seed_gives_the_same_bits(run: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, folder = run
    torch.randn(3)  # where torch's global generator stands does not matter
    loop.train(config, tmp_path / "run", quiet=True)
    assert weights(tmp_path / "run" / "model") == weights(folder / "model")
    assert without_times(records(tmp_path / "run")) == without_times(records(folder))


def test_another_seed_gives_another_model(
    run: tuple[TrainConfig, Path], recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    loop.train(recipe("seed=1"), tmp_path / "run", quiet=True)
    ours, theirs = weights(tmp_path / "run" / "model"), weights(run[1] / "model")
    # Zero at the start, a modulation's bias moves by what it sees; norm weights likewise.
    assert all(ours[name] != theirs[name] for name in ours)


def test_logging_and_evaluating_change_no_bit(
    run: tuple[TrainConfig, Path], recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    loop.train(recipe("log_every=100", "eval_every=3"), tmp_path / "run", quiet=True)
    assert weights(tmp_path / "run" / "model") == weights(run[1] / "model")
    events = [(line["event"], line["step"]) for line in records(tmp_path / "run")]
    assert events == [
        ("held_out", 3), ("held_out", 6), ("held_out", 9), ("train", 10), ("held_out", 10),
    ]  # fmt: skip


def test_a_model_is_drawn_by_its_seed_alone(recipe: Callable[..., TrainConfig]) -> None:
    first = loop.build_model(recipe())
    torch.randn(5)
    again, other = loop.build_model(recipe()), loop.build_model(recipe("seed=1"))
    for (name, a), b in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)
    # Drawn as the reference does, up to the numbers: what is zero there is zero here.
    reference = reference_twin(first)
    reference.initialize()
    for (name, ours), theirs in zip(first.named_parameters(), reference.parameters(), strict=True):
        assert bool((ours == 0).all()) == bool((theirs == 0).all()), name
        assert bool((ours == 1).all()) == bool((theirs == 1).all()), name


def test_building_a_model_leaves_the_global_generator_alone(recipe: Callable[..., TrainConfig]) -> None:
    stream = torch.get_rng_state()
    loop.build_model(recipe())
    assert torch.equal(torch.get_rng_state(), stream)


def test_training_leaves_the_global_generator_alone(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    stream = torch.get_rng_state()
    loop.train(recipe("steps=1"), tmp_path / "run", quiet=True)
    assert torch.equal(torch.get_rng_state(), stream)


# --- the gradient ------------------------------------------------------------------------------------------


def reference_twin(model: PackedTransformer) -> PixelFlowTransformer:
    """A reference model of the same shape."""
    c = model.config
    return PixelFlowTransformer(
        depth=c.depth,
        num_attention_heads=c.num_attention_heads,
        attention_head_dim=c.attention_head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        patch_size=c.patch_size,
        num_classes=c.num_classes,
        attention_bias=c.attention_bias,
    )


def images_of(batch: Batch, tokens: Tensor, config: TrainConfig) -> list[Tensor]:
    """Packed patches as images ``[1, c, h, w]`` float64, one by one."""
    p, c = config.model.patch_size, config.model.in_channels
    lengths = [rows * columns for rows, columns in batch.layout.grids]
    return [
        unpatchify(part.double(), (1, c, rows * p, columns * p), p)
        for part, (rows, columns) in zip(tokens.split(lengths), batch.layout.grids, strict=True)
    ]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_packed_gradient_is_that_of_the_reference_image_by_image(
    depth: int, recipe: Callable[..., TrainConfig]
) -> None:
    config = recipe(f"model.depth={depth}", "scheduler.num_stages=3", "batch_size=7", "label_drop=0.3")
    data, _ = load_digits(config.data, config.resolution, config.model.in_channels)
    batch = loop.training_batch(config, data, 0)
    assert batch.labels is not None
    assert len(set(batch.stage.tolist())) == 3
    assert 10 in batch.labels, "no label is dropped: choose another seed"

    packed = PackedTransformer(config.model)
    randomize(packed, seeded(2))
    single = reference_twin(packed)
    single.load_state_dict(packed.state_dict(), strict=True)
    packed, single = packed.double(), single.double()

    loss = batch_losses(packed, batch).mean()
    loss.backward()
    x, targets = images_of(batch, batch.tokens, config), images_of(batch, batch.targets, config)
    velocities = [
        single(x[i], batch.t_model[i : i + 1], batch.labels[i : i + 1]) for i in range(batch.layout.num_images)
    ]
    expected = reference_loss(velocities, targets)
    expected.backward()

    # Both are float64 sums of the same terms in another order: u = 1.1e-16 for each of the hundred or so operations
    # between a weight and the loss, if all of them pulled one way, against the largest entry of the gradient. One image
    # of seven weighted wrongly by a part in a trillion would show.
    scale = max(parameter.grad.abs().max().item() for parameter in single.parameters() if parameter.grad is not None)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    names = [name for name, _ in single.named_parameters()]
    assert [name for name, _ in packed.named_parameters()] == names
    for name, ours, theirs in zip(names, packed.parameters(), single.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None, name
        assert (ours.grad - theirs.grad).abs().max().item() < 1e-14 * scale, name
        assert theirs.grad.abs().max().item() > 1e-4 * scale, f"{name} has no gradient to compare"


def test_training_is_the_loop_written_out(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """AdamW on clipped gradients at the scheduled rate, averaged: the saved weights, step by step, in plain words."""
    config = recipe(
        "steps=4", "optimizer.weight_decay=0.1", "optimizer.betas=[0.8, 0.9]", "optimizer.max_grad_norm=0.39"
    )
    folder = loop.train(config, tmp_path / "run", quiet=True)
    data, _ = load_digits(config.data, config.resolution, config.model.in_channels)
    model = loop.build_model(config)
    parameters = dict(model.named_parameters())
    average = {name: p.detach().double().clone() for name, p in parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in parameters.items()}
    second = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for step in range(4):
        rate = 3e-3 * [1 / 3, 2 / 3, 1, 1][step]  # three steps of warm-up, then the cosine's start
        loss = batch_losses(model, loop.training_batch(config, data, step)).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        norms.append(norm)
        decay = min(0.9, (1 + step) / (10 + step))
        with torch.no_grad():
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                g = gradient * min(0.39 / (norm + 1e-6), 1.0)
                first[name].mul_(0.8).add_(0.2 * g)
                second[name].mul_(0.9).add_(0.1 * g * g)
                m, v = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
                p.mul_(1 - rate * 0.1).sub_(rate * m / (v.sqrt() + 1e-8))
                average[name] = decay * average[name] + (1 - decay) * p.double()
    assert min(norms) < 0.39 < max(norms), "some steps should be clipped and some not"
    assert [line["grad_norm"] for line in records(tmp_path / "run") if line["event"] == "train"] == pytest.approx(
        norms, rel=1e-4
    )
    saved = load_checkpoint(folder).state_dict
    for name, expected in average.items():
        # A weight of order 1 moves by about 3e-3 a step; its float32 sums round by 6e-8 each.
        assert (saved[name].double() - expected).abs().max() < 1e-6, name


# --- what is drawn -----------------------------------------------------------------------------------------


def test_held_out_images_are_each_seen_once_with_their_labels(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("batch_size=24", "label_drop=1.0")
    _, held_out = load_digits(config.data, config.resolution, config.model.in_channels)
    batches = list(loop.held_out_batches(config, held_out))
    again = list(loop.held_out_batches(config, held_out))
    # Nine shares of 200 images, of which none exceeds the batch size.
    assert sorted(batch.layout.num_images for batch in batches) == [22] * 7 + [23] * 2
    labels: Counter[int] = Counter()
    for batch, same in zip(batches, again, strict=True):
        assert batch.labels is not None
        labels += Counter(batch.labels.tolist())
        assert torch.equal(batch.tokens, same.tokens)
    assert labels == Counter(held_out.labels.tolist())
    assert not torch.equal(batches[0].t_model[:5], batches[1].t_model[:5])


def test_a_training_batch_is_a_pure_function_of_the_step(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    data, _ = load_digits(config.data, config.resolution, config.model.in_channels)
    late = loop.training_batch(config, data, 7)
    loop.training_batch(config, data, 3)
    assert torch.equal(loop.training_batch(config, data, 7).tokens, late.tokens)
    assert not torch.equal(loop.training_batch(config, data, 8).tokens[:16], late.tokens[:16])
    assert not torch.equal(loop.training_batch(recipe("seed=1"), data, 7).tokens[:16], late.tokens[:16])


def test_every_step_and_seed_changes_an_image_in_its_own_way(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, shown = loop.make_batch, []

    def watching(images: Tensor, labels: Tensor, plan: Plan, network: PixelFlowConfig, **options: Any) -> Batch:
        shown.append(images[plan.position.argsort()])
        return honest(images, labels, plan, network, **options)

    monkeypatch.setattr(loop, "make_batch", watching)
    whole, _ = load_digits(DataConfig(), 16, 1)
    one = ImageSet(whole.images[:1], whole.labels[:1])
    for config, step in ((recipe(), 0), (recipe(), 1), (recipe("seed=1"), 0), (recipe(), 0)):
        loop.training_batch(config, one, step)
    assert torch.equal(shown[0], shown[3])
    for i in range(3):
        for j in range(i):
            assert (shown[i] - shown[j]).abs().amax((1, 2, 3)).min() > 1e-3, (i, j)


def test_the_shares_of_ranks_are_the_batch_to_the_last_bit(recipe: Callable[..., TrainConfig]) -> None:
    """Augmented, mirrored, dropped and noisy: an image of a batch is the same whoever makes it, beside whomever."""
    config = recipe("batch_size=11", "label_drop=0.5", "data.augment.flip=true", "scheduler.num_stages=3")
    data, _ = load_digits(config.data, config.resolution, config.model.in_channels)

    def made(rank: int, world_size: int) -> dict[int, tuple[bytes, ...]]:
        batch = loop.training_batch(config, data, 4, rank, world_size)
        plan = plan_step(config, 4, len(data), rank, world_size)
        assert batch.labels is not None
        lengths = [rows * columns for rows, columns in batch.layout.grids]
        columns = [batch.tokens.split(lengths), batch.targets.split(lengths), batch.t_model, batch.labels, batch.stage]
        return {
            int(position): tuple(x.numpy().tobytes() for x in image)
            for position, *image in zip(plan.position, *columns, strict=True)
        }

    whole = made(0, 1)
    assert len(whole) == 11
    for world_size in (2, 3, 11):
        shares = [made(rank, world_size) for rank in range(world_size)]
        assert {position: image for share in shares for position, image in share.items()} == whole


def test_images_that_nothing_changes_stay_bytes(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = loop.make_batch, []

    def watching(images: Tensor, *rest: Any, **options: Any) -> Batch:
        seen.append(images.dtype)
        return honest(images, *rest, **options)

    for module in (loop, evaluation):
        monkeypatch.setattr(module, "make_batch", watching)
    config = recipe("data.augment={}")
    data, held_out = load_digits(config.data, config.resolution, config.model.in_channels)
    loop.training_batch(config, data, 0)
    next(loop.held_out_batches(config, held_out))
    assert seen == [torch.uint8, torch.uint8]


def test_an_epoch_shows_every_image_once(recipe: Callable[..., TrainConfig]) -> None:
    count = 12
    config = recipe("batch_size=4", "label_drop=0.0", "model.num_classes=12")
    data = ImageSet(torch.zeros(count, 1, 16, 16, dtype=torch.uint8), torch.arange(count))
    for epoch in range(3):
        seen: list[int] = []
        for step in range(3 * epoch, 3 * epoch + 3):
            labels = loop.training_batch(config, data, step).labels
            assert labels is not None
            seen += labels.tolist()
        assert sorted(seen) == list(range(count))


def test_losses_are_reported_by_stage() -> None:
    losses, stages = [1.0, 2.0, 4.0, 8.0], [1, 0, 1, 0]
    assert stage_sums(losses, stages, 3) == [10.0, 5.0, 0.0, 2.0, 2.0, 0.0]
    assert stage_means(stage_sums(losses, stages, 2)) == [5.0, 2.5]
    assert stage_means(stage_sums(losses, stages, 3)) == [5.0, 2.5, None]


# --- the learning rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (1, 10), (4, 10), (10, 10), (20, 10), (200, 8000)])
def test_learning_rate_in_closed_form(warmup: int, steps: int, schedule: Any) -> None:
    config = OptimizerConfig(lr=0.25, warmup_steps=warmup, schedule=schedule)
    for step in range(steps):
        if step < warmup:
            expected = 0.25 * (step + 1) / warmup
        elif schedule == "constant":
            expected = 0.25
        else:
            expected = 0.25 * math.cos(math.pi / 2 * (step - warmup) / (steps - warmup)) ** 2
        assert loop.learning_rate(config, step, steps) == pytest.approx(expected, rel=1e-12, abs=1e-15), step


def test_the_cosine_ends_close_to_zero() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine")
    assert loop.learning_rate(config, 999, 1000) < 1e-5
    assert loop.learning_rate(config, 500, 1000) == pytest.approx(0.5)


# --- refusals and failures ---------------------------------------------------------------------------------


def forbidden(*_: object) -> None:
    pytest.fail("training has begun")


def test_a_directory_that_holds_a_run_of_another_recipe_is_refused(
    run: tuple[TrainConfig, Path], recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run[1]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(loop, "training_batch", forbidden)
    with pytest.raises(ConfigError, match="seed: got 5, the checkpoint has 0") as caught:
        loop.train(recipe("seed=5"), folder, quiet=True)
    assert str(folder) in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_directory_that_holds_a_model_is_refused_before_training(
    run: tuple[TrainConfig, Path],
    recipe: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found out after training, the work would be lost."""
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    for file in (run[1] / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(loop, "training_batch", forbidden)
    with pytest.raises(FileExistsError):
        loop.train(recipe("steps=1"), tmp_path / "run", quiet=True)


def test_a_split_that_cannot_be_made_leaves_nothing(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.held_out"):
        loop.train(recipe("data.held_out=5000"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_speed_is_images_over_the_time_that_they_took(
    recipe: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own: a step takes a second, an evaluation a hundred, and it falls between two log lines."""
    now = 0.0

    def advancing(work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            nonlocal now
            now += seconds
            return work(*arguments)

        return timed

    monkeypatch.setattr(TrainStep, "begin", advancing(TrainStep.begin, 1.0))
    monkeypatch.setattr(loop, "held_out_loss", advancing(loop.held_out_loss, 100.0))
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: now))
    loop.train(recipe("log_every=4", "eval_every=3", "steps=8"), tmp_path / "run", quiet=True)
    speeds = [line["images_per_second"] for line in records(tmp_path / "run") if line["event"] == "train"]
    assert speeds == [8.0, 8.0]


# --- learning ----------------------------------------------------------------------------------------------


def test_the_loss_goes_down(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = recipe("steps=60", "batch_size=16", "eval_every=60", "ema_decay=0.8", "optimizer.lr=1e-2")
    folder = loop.train(config, tmp_path / "run", quiet=True)
    lines = records(tmp_path / "run")
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    # The averaged model has learnt as well, on images that it has not seen: its output was zero at first.
    _, held_out = load_digits(config.data, config.resolution, config.model.in_channels)
    batches = list(loop.held_out_batches(config, held_out))
    before = loop.held_out_loss(loop.build_model(config), batches, 2)
    after = next(line["stage_loss"] for line in lines if line["event"] == "held_out")
    assert all(late < 0.7 * early for late, early in zip(after, before, strict=True))
    assert after == pytest.approx(loop.held_out_loss(PixelFlowEngine.from_pretrained(folder).model, batches, 2))

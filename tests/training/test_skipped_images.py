"""Images that cannot be read: who stands in for them, what the log says, and when it is too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_training import loop
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import PreparedImages, SkippedImage, SkippedImages, UnreadableImageError, open_data
from pixelflow_training.plan import Plan, plan_held_out
from pixelflow_training.run import Log
from support.recipes import tiny_recipe
from support.runs import lines, outcome


class Numbers:
    """Images that are their own numbers; some are broken."""

    def __init__(self, count: int, broken: set[int]) -> None:
        self.labels = torch.arange(count) % 10
        self.broken = broken
        self.asked: list[int] = []

    def name(self, sample: int) -> str:
        return f"image {sample}"

    def load(self, sample: int) -> Tensor:
        self.asked.append(sample)
        if sample in self.broken:
            raise UnreadableImageError(f"broken {sample}")
        return torch.full((1, 18, 18), sample, dtype=torch.uint8)


def plan_of(config: TrainConfig, samples: list[int]) -> Plan:
    plan = plan_held_out(config, len(samples))
    return replace(plan, sample=torch.tensor(samples))


# --- who stands in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "asked", "given", "skipped"),
    [
        (set(), [2, 0, 1], [2, 0, 1], []),
        ({2}, [2, 0, 1], [3, 0, 1], [2]),
        ({2, 3}, [3, 2, 2], [4, 4, 4], [3, 2]),
        ({4}, [4, 4], [0, 0], [4]),  # the order is a circle
        ({0, 3, 4}, [1, 3, 0], [1, 1, 1], [3, 4, 0]),
    ],
)
def test_the_next_image_stands_in(
    broken: set[int], asked: list[int], given: list[int], skipped: list[int], tmp_path: Path
) -> None:
    config = tiny_recipe(tmp_path)
    source = Numbers(5, broken)
    taken = PreparedImages(source, torch.arange(5), config).take(plan_of(config, asked))
    assert [image.unique().tolist() for image in taken.images] == [[number] for number in given]
    assert taken.images.shape == (len(asked), 1, 16, 16)
    assert taken.labels.tolist() == given
    assert taken.skipped == tuple(SkippedImage(f"image {i}", f"broken {i}") for i in skipped)
    assert all(source.asked.count(i) == 1 for i in skipped), "a broken image is tried once for a plan"


def test_the_order_is_that_of_the_part(tmp_path: Path) -> None:
    """Held-out images never stand in for those that are trained on, nor the other way."""
    config = tiny_recipe(tmp_path)
    part = PreparedImages(Numbers(10, {7, 1}), torch.tensor([4, 7, 1, 9]), config)
    taken = part.take(plan_of(config, [1, 3, 2, 0]))
    assert [int(image[0, 0, 0]) for image in taken.images] == [9, 9, 9, 4]
    assert taken.labels.tolist() == [9, 9, 9, 4]


def test_all_parts_are_the_source(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "data.held_out=4")
    train, held_out = open_data(config, Numbers(11, set()))
    seen = [
        part.take(plan_of(config, list(range(len(part))))).images[:, 0, 0, 0].tolist() for part in (train, held_out)
    ]
    assert [len(part) for part in seen] == [7, 4]
    assert sorted(seen[0] + seen[1]) == list(range(11))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()
    assert seen == [order[4:], order[:4]], "the digits are split like this"


def test_past_the_limit_nothing_more_is_read(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path, "data.max_skipped=2")
    source = Numbers(100, set(range(1, 90)))
    taken = PreparedImages(source, torch.arange(100), config).take(plan_of(config, [0, 5, 3]))
    assert [name for name, _ in taken.skipped] == ["image 5", "image 6", "image 7"]
    assert source.asked == [0, 5, 6, 7]


def test_a_source_without_a_single_image_is_an_error(tmp_path: Path) -> None:
    config = tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match=r"^data: none of 3 images can be read; the last is image 0: broken 0$"):
        PreparedImages(Numbers(3, {0, 1, 2}), torch.arange(3), config).take(plan_of(config, [1]))


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (torch.zeros(1, 18, 18), r"torch.float32 \[1, 18, 18\]"),
        (torch.zeros(3, 18, 18, dtype=torch.uint8), r"torch.uint8 \[3, 18, 18\]"),
        (torch.zeros(18, 18, dtype=torch.uint8), r"torch.uint8 \[18, 18\]"),
        (torch.zeros(1, 0, 18, dtype=torch.uint8), r"torch.uint8 \[1, 0, 18\]"),
    ],
)
def test_a_source_that_breaks_its_word_is_told(image: Tensor, got: str, tmp_path: Path) -> None:
    source = Numbers(3, set())
    source.load = lambda sample: image  # type: ignore[method-assign]
    config = tiny_recipe(tmp_path)
    with pytest.raises(ValueError, match=rf"^image image 1: got {got}, expected torch.uint8 \[1, H, W\]$"):
        PreparedImages(source, torch.arange(3), config).take(plan_of(config, [1]))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 10]), "labels: got 0 to 10, expected 0 to 9: model.num_classes is 10"),
        (torch.tensor([-1, 3]), "labels: got -1 to 3, expected 0 to 9: model.num_classes is 10"),
        (torch.tensor([0.0, 1.0]), r"labels: got torch.float32 \[2\], expected torch.int64 \[N\]"),
        (torch.tensor([[0, 1]]), r"labels: got torch.int64 \[1, 2\], expected torch.int64 \[N\]"),
    ],
)
def test_labels_that_do_not_suit_the_model_are_refused(labels: Tensor, said: str, tmp_path: Path) -> None:
    source = Numbers(2, set())
    source.labels = labels
    with pytest.raises(ValueError, match=f"^{said}$"):
        open_data(tiny_recipe(tmp_path, "data.held_out=1"), source)


# --- the log -----------------------------------------------------------------------------------------------


def test_each_is_logged_once_and_counted_over_all_of_a_run(tmp_path: Path) -> None:
    a, b, c = (SkippedImage(name, f"{name} is broken") for name in "abc")
    with Log(tmp_path / "log.jsonl", 0) as log:
        skipped = SkippedImages(log, 3)
        skipped.add(0, [a])
        skipped.add(1, [a, b, b])
        skipped.add(2, [b, a])
        skipped.add(5, [c])
        assert len(skipped) == 3
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"event": "skipped_image", "step": step, "name": name, "reason": f"{name} is broken"}
        for step, name in ((0, "a"), (1, "b"), (5, "c"))
    ]
    with Log(tmp_path / "log.jsonl", 4) as log:  # goes on from step 4: what came later comes again
        skipped = SkippedImages(log, 3)
        assert len(skipped) == 2
        skipped.add(5, [c, a])
        assert len(skipped) == 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_one_more_than_the_limit_stops_with_the_last_names(tmp_path: Path) -> None:
    images = [SkippedImage(f"image {i}", "") for i in range(8)]
    with Log(tmp_path / "log.jsonl", 0) as log:
        skipped = SkippedImages(log, 6)
        skipped.add(3, images[:6])
        skipped.add(4, images[:6])
        with pytest.raises(ValueError, match="skipped") as caught:
            skipped.add(5, images[6:7])
    assert str(caught.value) == (
        "step 5: 7 images could not be read, and data.max_skipped is 6; "
        "the last are image 2, image 3, image 4, image 5, image 6; the log has the reasons"
    )
    assert "image 6" in (tmp_path / "log.jsonl").read_text(), "the log has not got the reason"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, "data.held_out=6", "checkpoint.every=3", *overrides)


def images_skipped(run: Path) -> list[tuple[str, int]]:
    return [(line["name"], line["step"]) for line in lines(run) if line["event"] == "skipped_image"]


def test_a_run_skips_logs_and_goes_on(
    recipe: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after some images were skipped and before others are: as if it never was."""
    config, broken = recipe(), {10, 12, 29, 38, 44}
    loop.train(config, tmp_path / "whole", quiet=True, source=Numbers(60, broken))
    whole = images_skipped(tmp_path / "whole")
    assert sorted(name for name, _ in whole) == sorted(f"image {i}" for i in broken)
    assert min(step for _, step in whole) == 0, "none of the broken images is held out"
    assert any(step in (4, 5) for _, step in whole), "none is met between the checkpoint and the stop"
    assert any(step > 5 for _, step in whole)

    honest = loop.training_batch
    monkeypatch.setattr(loop, "training_batch", lambda c, d, s, *share: honest(c, d, s, *share) if s < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(config, tmp_path / "run", quiet=True, source=Numbers(60, broken))
    assert images_skipped(tmp_path / "run") == [(name, step) for name, step in whole if step <= 5]
    monkeypatch.undo()
    loop.train(config, tmp_path / "run", quiet=True, source=Numbers(60, broken))
    assert outcome(tmp_path / "run", config) == outcome(tmp_path / "whole", config)


def test_a_run_stops_past_the_limit_and_goes_on_with_a_higher_one(
    recipe: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config, broken = recipe("data.max_skipped=4"), {10, 12, 29, 38, 44}
    with pytest.raises(ValueError, match=r"^step \d+: 5 images could not be read, and data.max_skipped is 4"):
        loop.train(config, tmp_path / "run", quiet=True, source=Numbers(60, broken))
    assert len(images_skipped(tmp_path / "run")) == 5
    more = recipe("data.max_skipped=5")
    loop.train(more, tmp_path / "run", quiet=True, source=Numbers(60, broken))
    loop.train(more, tmp_path / "whole", quiet=True, source=Numbers(60, broken))
    ours, theirs = (outcome(tmp_path / name, more) for name in ("run", "whole"))
    assert ours == theirs


def test_images_that_are_given_are_not_digits(recipe: Callable[..., TrainConfig], monkeypatch: Any) -> None:
    monkeypatch.setattr("pixelflow_training.data.open.load_digits", lambda *_: pytest.fail("digits"))
    train, _ = open_data(recipe(), Numbers(30, set()))
    assert len(train) == 24

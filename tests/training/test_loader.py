"""Workers change no bit: images read ahead by other processes are those that are read between the steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pixelflow_engine import load_checkpoint
from pixelflow_training import loop
from pixelflow_training.config import TrainConfig, load_config
from pixelflow_training.data import Loader, Taken, UnreadableImageError, open_data
from pixelflow_training.plan import plan_held_out, plan_step
from support.pictures import photograph_tiles
from support.recipes import tiny_recipe
from support.runs import lines, outcome

FOLDER = [
    "model.in_channels=3",
    "model.out_channels=3",
    "model.num_classes=3",
    "data.name=folder",
    "data.held_out=5",
    "data.augment={flip: true}",
    "checkpoint.every=3",
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight photographs, of which three are broken."""
    root = tmp_path_factory.mktemp("photographs")
    photograph_tiles(root, classes=3, each=8)
    for name in ("class 0/003.JPEG", "class 1/000.JPEG", "class 2/007.JPEG"):
        (root / name).write_bytes((root / name).read_bytes()[:500])
    return root


@pytest.fixture
def recipe(tree: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, *FOLDER, f"data.path={tree}", *overrides)


def bits(taken: Taken) -> tuple[object, ...]:
    return taken.images.numpy().tobytes(), taken.labels.tolist(), list(taken.skipped)


def test_workers_give_what_the_source_gives_until_one_is_killed(recipe: Callable[..., TrainConfig]) -> None:
    """The second rank's share from a step in the middle; signals that tell the run to stop pass workers by."""
    config = recipe("data.workers=2", "steps=99")
    data, _ = open_data(config)
    stream, on_death = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    with Loader(data, config, 3, rank=1, world_size=2) as loader:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        assert len(loader) == len(data)
        skipped = 0
        for step in range(3, 11):
            for worker in workers:
                os.kill(worker.pid or 0, signal.SIGINT)
                os.kill(worker.pid or 0, signal.SIGTERM)
            plan = plan_step(config, step, len(data), 1, 2)
            taken = loader.take(plan)
            skipped += len(taken.skipped)
            assert bits(taken) == bits(data.take(plan)), step
        assert skipped > 0
        assert signal.getsignal(signal.SIGCHLD) == on_death
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "signals are blocked here as well"
        assert torch.equal(torch.get_rng_state(), stream), "torch's global generator has moved"

        killed = workers[0].pid or 0
        os.kill(killed, signal.SIGKILL)
        said = rf"^step 1[1-9]: a process that reads images has ended unexpectedly: {killed} \(exit code -9\)"

        def until_it_is_missed() -> None:
            for step in range(11, 99):  # some are made already
                loader.take(plan_step(config, step, len(data), 1, 2))

        with pytest.raises(ChildProcessError, match=said):
            until_it_is_missed()
    assert not multiprocessing.active_children()


def test_a_worker_is_missed_whose_connection_ends_before_it_does(recipe: Callable[..., TrainConfig]) -> None:
    """As the system does it now and then."""
    config = recipe()
    loader = Loader(open_data(config)[0], config, 3)
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    timer = threading.Timer(0.5, worker.kill)

    def cut() -> Iterator[Taken]:
        timer.start()
        raise ConnectionResetError(104, "Connection reset by peer")
        yield

    loader._processes = [worker]
    with pytest.raises(ChildProcessError, match=rf"^step 3: .*: {worker.pid} \(exit code -9\)"):
        loader._receive(cut())


def test_a_run_with_workers_ends_as_one_without(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    alone, helped = recipe(), recipe("data.workers=2")
    loop.train(alone, tmp_path / "alone", quiet=True)
    names = [line["name"] for line in lines(tmp_path / "alone") if line["event"] == "skipped_image"]
    assert sorted(names) == ["class 0/003.JPEG", "class 1/000.JPEG", "class 2/007.JPEG"]

    honest = loop.training_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_batch", lambda c, d, s, *share: honest(c, d, s, *share) if s < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(alone, tmp_path / "helped", quiet=True)
    loop.train(helped, tmp_path / "helped", quiet=True)
    assert not multiprocessing.active_children()
    ours, theirs = (outcome(tmp_path / name, alone) for name in ("helped", "alone"))
    assert {**ours, "recipe": ""} == {**theirs, "recipe": ""}
    assert "workers: 2" in ours["recipe"]


def test_without_workers_there_are_no_processes(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    data, _ = open_data(config)
    with Loader(data, config, 4) as loader:
        for step in (4, 5):
            plan = plan_step(config, step, len(data))
            assert bits(loader.take(plan)) == bits(data.take(plan))
        assert not multiprocessing.active_children()


def test_a_finished_run_starts_no_workers(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("data.workers=2")
    data, _ = open_data(config)
    with Loader(data, config, config.steps):
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("step", [0, 2, 4])
def test_another_step_than_the_next_is_refused(step: int, recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    data, _ = open_data(config)
    with Loader(data, config, 3) as loader, pytest.raises(ValueError, match=rf"^step: got {step}, expected 3"):
        loader.take(plan_step(config, step, len(data)))


def test_images_arrive_on_the_device_that_wants_them(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    data, _ = open_data(config)
    taken = Loader(data, config, 0, device="meta").take(plan_step(config, 0, len(data)))
    assert taken.images.device.type == taken.labels.device.type == "meta"


def test_what_is_trained_on_and_what_is_held_out_are_the_tree(recipe: Callable[..., TrainConfig]) -> None:
    train, held_out = open_data(recipe())
    assert (len(train), len(held_out)) == (19, 5)
    batches = list(loop.held_out_batches(recipe(), held_out))
    assert sum(batch.layout.num_images for batch in batches) == 5
    plan = plan_held_out(recipe(), 5)
    assert held_out.take(plan).images.shape == (5, 3, 16, 16)


def test_the_smoke_recipe_trains_with_everything_on(tmp_path: Path) -> None:
    """With a worker, mirrors, dropped labels and stages of uneven counts, in seconds."""
    config = load_config("smoke")
    folder = loop.train(config, tmp_path / "run", quiet=True)
    assert load_checkpoint(folder).config == config.network
    events = [(line["event"], line["step"]) for line in lines(tmp_path / "run")]
    assert [step for event, step in events if event == "train"] == [2, 4, 6, 8, 10, 12]
    assert [step for event, step in events if event == "held_out"] == [6, 12]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step-00000000", "step-00000006", "step-00000010", "step-00000012"]


class OddError(ValueError):
    """Cannot be made from what it says."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{number}: {why}")


class Failing:
    """A source whose every image is an error."""

    def __init__(self, error: Exception) -> None:
        self.labels = torch.arange(20) % 3
        self.error = error

    def name(self, sample: int) -> str:
        return str(sample)

    def load(self, sample: int) -> torch.Tensor:
        raise self.error


class Odd(Failing):
    """A source whose errors cannot be sent to another process."""

    def __init__(self) -> None:
        super().__init__(ValueError())

    def load(self, sample: int) -> torch.Tensor:
        raise OddError(sample, "odd")


def test_errors_of_the_data_are_the_same_from_a_worker(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    missing = FileNotFoundError(2, "No such file or directory", str(tmp_path / "a.png"))
    for error in (ValueError("not as promised"), missing, UnreadableImageError("no image")):
        said = []
        for workers in (0, 1):
            config = recipe(f"data.workers={workers}")
            data, _ = open_data(config, Failing(error))
            with Loader(data, config, 0) as loader, pytest.raises((ValueError, OSError)) as found:
                loader.take(plan_step(config, 0, len(data), 0, 1))
            said.append((type(found.value), str(found.value), getattr(found.value, "filename", None)))
        assert said[0] == said[1]
        assert "\n" not in said[1][1]


def test_an_error_that_would_be_lost_on_its_way_is_told_by_torch(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("data.workers=1")
    data, _ = open_data(config, Odd())
    with Loader(data, config, 0) as loader, pytest.raises((ValueError, RuntimeError), match=r"(?s)OddError.*: odd"):
        loader.take(plan_step(config, 0, len(data), 0, 1))

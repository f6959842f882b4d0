"""Two processes train together: as one would, stopped and killed like one, and on from what one has left."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pixelflow_engine import load_checkpoint
from pixelflow_engine.errors import ConfigError
from pixelflow_training import loop
from pixelflow_training.checkpoint import Checkpointer
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.evaluation import averaged_weights
from pixelflow_training.graphs import refuse_graphs
from pixelflow_training.ranks import ALONE, is_of_an_exchange, join, numbered, of_this_rank
from pixelflow_training.signals import EXIT_STOPPED
from pixelflow_training.state import TrainState
from support.ranks import FAILED, LOST, in_ranks, said, train, train_signalled
from support.recipes import tiny_recipe
from support.runs import digest, lines, state_of
from support.steps import flat, random_state

OVERRIDES = ["steps=6", "log_every=1", "eval_every=3", "checkpoint.every=2", "batch_size=9"]
KEEP_ALL = ["checkpoint.every=1", "checkpoint.keep=9"]
WAYS = {"copies": [], "sharded": ["compute.shard=2"]}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> list[str]:
    return [*OVERRIDES, *WAYS[request.param]]


@pytest.fixture(scope="module")
def whole(way: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder)
    assert in_ranks(2, folder, train, way) == [0, 0], said(folder, 0) + said(folder, 1)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    loop.train(tiny_recipe(folder, *OVERRIDES, *KEEP_ALL), folder / "run", quiet=True)
    return folder


def prepare(folder: Path) -> Path:
    """A place for each rank's recipe file."""
    for rank in range(4):
        (folder / str(rank)).mkdir()
    return folder


def recipe(folder: Path, *overrides: str) -> TrainConfig:
    return tiny_recipe(folder, *OVERRIDES, *overrides)


def trained(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines(folder / "run") if line["event"] == "train"]


def test_two_ranks_train_as_one(whole: Path, alone: Path) -> None:
    """The same images; sums in another order, which training then magnifies: a step by less than a thousandth."""
    ours, theirs = trained(whole), trained(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(ours, theirs, strict=True):
        rounding = 1e-6 * 10 ** min(one["step"] - 1, 3)
        assert one["loss"] == pytest.approx(two["loss"], rel=rounding), one["step"]
        assert one["stage_loss"] == pytest.approx(two["stage_loss"], rel=rounding), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=10 * rounding), one["step"]
    held_out = [
        [line["stage_loss"] for line in lines(f / "run") if line["event"] == "held_out"] for f in (whole, alone)
    ]
    assert held_out[0][0] == pytest.approx(held_out[1][0], rel=1e-3)
    model = load_checkpoint(whole / "run" / "model")
    assert model.config == recipe(alone).network
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict.values())


def test_groups_that_share_a_copy_train_as_one_and_so_do_parts(alone: Path, tmp_path: Path) -> None:
    """Four ranks, two copies of the weights, and packs of two images or less."""
    prepare(tmp_path)
    overrides = [*OVERRIDES, *KEEP_ALL, "compute.shard=2", "compute.max_tokens=16"]
    assert in_ranks(4, tmp_path, train, overrides) == [0, 0, 0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    for one, two in zip(trained(tmp_path), trained(alone), strict=True):
        rounding = 1e-6 * 10 ** min(one["step"] - 1, 3)
        assert one["loss"] == pytest.approx(two["loss"], rel=rounding), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=10 * rounding), one["step"]
    first = [state_after(folder, 1, recipe(folder)) for folder in (tmp_path, alone)]
    assert_a_step_apart_by_rounding(*first, TrainState(recipe(alone), loop.build_model(recipe(alone))), recipe(alone))
    assert_the_average_is_exported(tmp_path)


def test_the_same_again_gives_the_same_bits(whole: Path, way: list[str], tmp_path: Path) -> None:
    assert in_ranks(2, prepare(tmp_path), train, way) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert lines(tmp_path / "run") == lines(whole / "run")
    assert saved(tmp_path) == saved(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_by_a_signal_to_any_rank_it_still_arrives(
    whole: Path, way: list[str], tmp_path: Path, rank: int
) -> None:
    prepare(tmp_path)
    codes = in_ranks(2, tmp_path, train_signalled, way, 3, rank, signal.SIGTERM)
    assert codes == [EXIT_STOPPED, EXIT_STOPPED], said(tmp_path, 0) + said(tmp_path, 1)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004\n"
    assert in_ranks(2, tmp_path, train, way) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert lines(tmp_path / "run") == lines(whole / "run")
    assert saved(tmp_path) == saved(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_named_and_no_more_is_lost_than_since_the_last_checkpoint(
    whole: Path, way: list[str], tmp_path: Path, rank: int
) -> None:
    prepare(tmp_path)
    codes = in_ranks(2, tmp_path, train_signalled, way, 5, rank, signal.SIGKILL)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == LOST, said(tmp_path, 1 - rank)
    assert "has ended or does not answer" in said(tmp_path, 1 - rank)
    # That of step 4 may have been under way.
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() in ("step-00000002\n", "step-00000004\n")
    assert in_ranks(2, tmp_path, train, way) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert lines(tmp_path / "run") == lines(whole / "run")
    assert saved(tmp_path) == saved(whole)


def saved(folder: Path) -> str:
    """Of the last checkpoint, whole, whoever wrote it."""
    return digest(state_of(folder / "run", recipe(folder)).tensors())


def test_another_number_of_ranks_goes_on_from_the_same_state(whole: Path, way: list[str], tmp_path: Path) -> None:
    """What one process has saved is read by two, and the other way round: a step is the same but for rounding."""
    assert_the_average_is_exported(whole)
    constant = [*OVERRIDES, "optimizer.schedule=constant"]
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    prepare(two)
    loop.train(tiny_recipe(two, *constant, "steps=2"), two / "run", quiet=True)
    shutil.copytree(two, one)
    loop.train(tiny_recipe(one, *constant, "steps=3"), one / "run", quiet=True)
    overrides = [*way, "optimizer.schedule=constant", "steps=3"]
    assert in_ranks(2, two, train, overrides) == [0, 0], said(two, 0) + said(two, 1)

    config = tiny_recipe(tmp_path, *constant, "steps=3")
    before, ours, theirs = (state_after(folder, step, config) for folder, step in ((two, 2), (two, 3), (one, 3)))
    assert_a_step_apart_by_rounding(ours, theirs, before, config)
    with torch.no_grad():
        next(ours.model.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(AssertionError):  # it would be noticed
        assert_a_step_apart_by_rounding(ours, theirs, before, config)
    for folder in (one, two):
        loop.train(tiny_recipe(folder, *constant, "steps=6"), folder / "run", quiet=True)
    for ours_now, theirs_now in zip(trained(two), trained(one), strict=True):
        rounding = 1e-6 * 10 ** min(ours_now["step"], 3)
        assert ours_now["loss"] == pytest.approx(theirs_now["loss"], rel=rounding), ours_now["step"]
    assert [line["step"] for line in trained(two)] == [1, 2, 3, 4, 5, 6]


def state_after(folder: Path, step: int, config: TrainConfig) -> TrainState:
    """As the checkpoint of a step has it, read by this process."""
    state = TrainState(config, loop.build_model(config))
    tensors = state.tensors()
    with Checkpointer(folder / "run" / "checkpoints", config) as checkpoints:
        assert checkpoints.read(tensors, step)
    state.take_counters(tensors)
    assert state.step == step
    return state


def assert_the_average_is_exported(folder: Path) -> None:
    """Of every tensor those who have it have written its part: gathered on the way to the model, it is the same."""
    averaged = state_of(folder / "run", recipe(folder)).ema.model.state_dict()
    assert digest({"model": averaged}) == digest({"model": load_checkpoint(folder / "run" / "model").state_dict})


def assert_a_step_apart_by_rounding(
    ours: TrainState, theirs: TrainState, before: TrainState, config: TrainConfig
) -> None:
    """Two states that one step from the same state has led to differ as its gradients do, and by AdamW's formula.

    Gradients are sums in another order: u for each of the hundred or so operations between a weight and the loss. The
    rest is counted: what AdamW makes of a moment is some ten operations, a weight and an average are a few.
    """
    u, (first, second) = 2.0**-24, config.optimizer.betas
    apart = 100 * u
    lr = loop.learning_rate(config.optimizer, before.step, config.steps)

    def of(state: TrainState) -> tuple[torch.Tensor, ...]:
        moments = [state.optimizer.state[parameter] for parameter in state.model.parameters()]
        groups = (
            state.model.parameters(),
            state.ema.model.parameters(),
            *([moment[key] for moment in moments] for key in ("exp_avg", "exp_avg_sq")),
        )
        return tuple(flat(group) for group in groups)

    (w, a, m, v), (w_, a_, m_, v_), (_, _, m_before, _) = of(ours), of(theirs), of(before)
    g = (m_ - first * m_before) / (1 - first)
    assert (m - m_).norm() <= (1 - first) * apart * g.norm() + 2 * u * m_.norm()
    assert (v - v_).norm() <= (1 - second) * apart * 2 * g.abs().max() * g.norm() + 2 * u * v_.norm()

    t = theirs.ema.step
    assert ours.ema.step == t == before.ema.step + 1

    def move(m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return lr * (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + 1e-8)

    moved = move(m, v) - move(m_, v_)
    assert ((w - w_ + moved).abs() <= 2 * u * w_.abs() + 20 * u * move(m_, v_).abs()).all()
    decay = min(config.ema_decay, t / (9 + t))
    assert ((a - a_ - (1 - decay) * (w - w_)).abs() <= 4 * u * (a_.abs() + w_.abs())).all()


def poison_one(folder: Path, overrides: list[str], rank: int) -> None:
    """For :func:`in_ranks`: the third step's batch of one rank has a target that is not finite."""
    honest = loop.training_batch

    def poisoned(config: TrainConfig, data: Any, step: int, *share: int) -> Batch:
        batch = honest(config, data, step, *share)
        if step == 2 and int(os.environ["RANK"]) == rank:
            batch.targets[0, 0] = math.nan
        return batch

    loop.training_batch = poisoned
    train(folder, overrides)


def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_on_all(way: list[str], tmp_path: Path) -> None:
    assert in_ranks(2, prepare(tmp_path), poison_one, way, 1) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    events = [(line["event"], line["step"]) for line in lines(tmp_path / "run")]
    assert ("skipped", 3) in events
    assert ("train", 3) not in events
    assert [step for event, step in events if event == "train"] == [1, 2, 4, 5, 6]


def ask(folder: Path) -> None:
    """For :func:`in_ranks`: everything that ranks tell each other, into a file."""
    with join(recipe(folder / os.environ["RANK"])) as ranks:
        found = {
            "together": ranks.together(["a", "b"][: ranks.rank + 1]),
            "nothing": ranks.together([]),
            "total": ranks.total([1.5, ranks.rank]),
            "first": ranks.first_does(lambda: ranks.rank + 7),
        }
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps(found))


def test_what_ranks_tell_each_other_is_the_same_for_all(tmp_path: Path) -> None:
    assert in_ranks(2, prepare(tmp_path), ask) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found == {"together": ["a", "a", "b"], "nothing": [], "total": [3.0, 1.0], "first": 7}


def gather_the_average(folder: Path) -> None:
    """For :func:`in_ranks`: the average of sharded weights, and the digest of what each rank has of it."""
    config = recipe(folder / os.environ["RANK"], "compute.shard=2")
    with join(config) as ranks:
        state = random_state(config, ranks)
        assert all(isinstance(tensor, DTensor) for tensor in state.ema.model.state_dict().values())
        gathered = averaged_weights(state, ranks)
    (folder / f"found-{ranks.rank}.json").write_text(json.dumps([len(gathered), digest({"ema": gathered})]))


def test_the_average_is_gathered_where_it_is_used_and_nowhere_else(tmp_path: Path) -> None:
    assert in_ranks(2, prepare(tmp_path), gather_the_average) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    whole = random_state(recipe(tmp_path)).ema.model.state_dict()
    assert found == [[len(whole), digest({"ema": whole})], [0, digest({})]]


def run_an_errand(folder: Path) -> None:
    """For :func:`in_ranks`: one that takes longer than ranks wait for each other in a step."""
    with join(recipe(folder / os.environ["RANK"])) as ranks:
        # Ranks must have met within that time too, on a machine that is busy.
        hasty = replace(ranks, control=dist.new_group(backend="gloo", timeout=timedelta(seconds=5)))
        assert hasty.first_does(lambda: time.sleep(7.5) or ranks.rank + 7) == 7


def test_what_the_first_rank_does_for_all_may_take_its_time(tmp_path: Path) -> None:
    assert in_ranks(2, prepare(tmp_path), run_an_errand) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)


def test_too_many_steps_that_are_not_finite_stop_all_ranks(tmp_path: Path) -> None:
    overrides = [*OVERRIDES, "guard.max_skipped=0"]
    assert in_ranks(2, prepare(tmp_path), poison_one, overrides, 1) == [FAILED, FAILED]
    for rank in (0, 1):
        assert "FloatingPointError: step 3: the loss or the gradient was not finite" in said(tmp_path, rank)
    batches = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert [(batch["step"], len(batch["samples"])) for batch in batches] == [(3, 9)], "those of both ranks"


def test_errors_of_the_first_rank_are_told_by_all(tmp_path: Path) -> None:
    prepare(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("")
    assert in_ranks(2, tmp_path, train, OVERRIDES) == [FAILED, FAILED]
    for rank in (0, 1):
        assert "FileExistsError: output:" in said(tmp_path, rank)


def test_what_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"compute\.shard: got 2, but there is one process"),
        join(recipe(tmp_path, "compute.shard=2")),
    ):
        pass
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=r"compute\.shard: got 3, expected a divisor of 4"),
        join(recipe(tmp_path, "compute.shard=3")),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="batch_size: got 2, expected at least 4"),
        join(recipe(tmp_path, "batch_size=2")),
    ):
        pass


@pytest.mark.parametrize(("here", "refused"), [("2", True), ("1", False), (None, True)])
def test_one_gpu_is_not_for_several_ranks(monkeypatch: pytest.MonkeyPatch, here: str | None, refused: bool) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert of_this_rank("cuda") == "cuda:1"
    assert of_this_rank("cpu") == "cpu"
    if refused:
        with pytest.raises(
            ConfigError, match=r"^compute\.device: got cuda:0 for 2 ranks on this machine, expected cuda"
        ):
            of_this_rank("cuda:0")
    else:
        assert of_this_rank("cuda:0") == "cuda:0"


def test_a_gpu_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is there would be copied there, step by step: torch's two names of one device are not equal."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert numbered(torch.device("cuda")) == torch.device("cuda:3")
    assert numbered(torch.device("cuda:1")) == torch.device("cuda:1")
    assert numbered(torch.device("cpu")) == torch.device("cpu")


def test_alone_there_is_nobody_to_ask() -> None:
    assert ALONE.alone
    assert ALONE.first
    assert ALONE.total([1.5, 2.0]) == [1.5, 2.0]
    assert ALONE.first_does(lambda: 3) == 3


def train_and_look_at_filters(folder: Path, overrides: list[str]) -> None:
    """For :func:`in_ranks`: the warning filters are global to the process."""
    before = list(warnings.filters)
    train(folder, overrides)
    assert list(warnings.filters) == before


def test_a_sharded_run_leaves_warnings_as_they_were(tmp_path: Path) -> None:
    prepare(tmp_path)
    codes = in_ranks(2, tmp_path, train_and_look_at_filters, [*OVERRIDES, "compute.shard=2", "steps=1"])
    assert codes == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)


def test_a_single_rank_of_torchrun_is_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is exchanged, so nothing keeps a step out of a graph."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with join(recipe(tmp_path)) as ranks:
        assert ranks.alone
        assert ranks.first
        assert not dist.is_initialized()
        refuse_graphs("triton", ranks, torch.device("cuda"))
    with (
        pytest.raises(ConfigError, match=r"compute\.shard: got 2, but there is one process"),
        join(recipe(tmp_path, "compute.shard=2")),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "of_an_exchange"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3141", True),
        ("[enforce fail at ../third_party/gloo/gloo/transport/tcp/pair.cc:123] ret > 0. Connection reset", True),
        ("NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:121, unhandled system error", True),
        ("NCCL communicator was aborted on rank 0", True),
        ("Parent directory runs/nccl-test/model does not exist.", False),
        ("runs/gloo/log.jsonl: cannot be read", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_a_lost_rank_is_told_from_other_errors(text: str, of_an_exchange: bool) -> None:
    assert is_of_an_exchange(RuntimeError(text)) == of_an_exchange


def test_torchrun_starts_it(tmp_path: Path) -> None:
    """The command of the documentation, as a user gives it."""
    tiny_recipe(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += ["-m", "pixelflow_engine", "train", "--config", str(tmp_path / "tiny.yaml"), "compute.shard=2"]
    command += ["--output", str(tmp_path / "run"), "steps=2", "compute.device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 1, "the first rank speaks for all"
    assert "Warning" not in done.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][-1] == 2

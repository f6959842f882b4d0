"""Steps replayed from graphs are the steps launched one by one, bit for bit, whatever was replayed before.

On a CPU a recording stands in for the graph (``support.recording``), and the update's operations for its kernels.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixelflow_engine.errors import CaptureError, ConfigError
from pixelflow_training import loop
from pixelflow_training.config import TrainConfig, load_config
from pixelflow_training.graphs import refuse_graphs, shapes_of_steps
from pixelflow_training.plan import parts_of_step, plan_step
from pixelflow_training.ranks import ALONE, Ranks
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep
from pixelflow_training.update import FusedUpdate
from support.recipes import tiny_recipe
from support.recording import RecordingCapture, poison
from support.steps import batch_of, bits, flat, random_state, recorded_step, step_of

UNEVEN = ("scheduler.num_stages=3", "batch_size=4")  # three shapes in turn
KINDS = {
    "float32": (),
    "bfloat16": ("compute.dtype=bfloat16",),
    "parts": ("compute.dtype=bfloat16", "compute.max_tokens=24"),
    "recomputed": ("compute.recompute=blocks",),
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, *UNEVEN, *overrides)


def go(step: TrainStep, config: TrainConfig, *numbers: int) -> None:
    """Steps of these numbers, each at a rate of its own."""
    for i in numbers:
        assert step(batch_of(config, i), 1e-3 / (1 + i), parts_of_step(config, i)).finite


def eager(config: TrainConfig, *numbers: int) -> TrainState:
    state = random_state(config)
    go(step_of(state, config, fused=True), config, *numbers)
    return state


# --- few shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "batch", "most"), [(3, 4, None), (4, 6, None), (4, 8, None), (3, 7, 70), (4, 10, 100)]
)
def test_there_are_as_many_shapes_as_are_promised(tmp_path: Path, stages: int, batch: int, most: int | None) -> None:
    """Those of the plans of many steps, and of many seeds: each turns up, and no other."""
    recipe = ["resolution=32", f"scheduler.num_stages={stages}", f"batch_size={batch}"]
    seen = set()
    for seed in range(3):
        config = tiny_recipe(tmp_path, *recipe, f"seed={seed}", *([f"compute.max_tokens={most}"] if most else []))
        for step in range(3 * stages):
            plan, parts = plan_step(config, step, 50), parts_of_step(config, step)
            sides = [(32 >> (stages - 1 - stage)) // 4 for stage in plan.stage.tolist()]
            seen.add(tuple(tuple((side, side) for side in sides[part::parts]) for part in range(parts)))
    assert seen == set(shapes_of_steps(config))
    assert len(seen) == stages // math.gcd(stages, batch)


def test_the_recipes_have_one_shape_or_three() -> None:
    names = ("digits", "digits-two-minutes", "xl-imagenet256", "smoke")
    assert [len(shapes_of_steps(load_config(name))) for name in names] == [1, 1, 1, 3]


# --- replays equal launches --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_has_the_bits_of_the_launches(recipe: Callable[..., TrainConfig], kind: str) -> None:
    config, capture = recipe(*KINDS[kind]), RecordingCapture()
    state = random_state(config)
    step = recorded_step(state, config, capture)
    go(step, config, *range(5))
    assert bits(state) == bits(eager(config, *range(5)))
    assert (capture.captured, capture.replayed) == (3, 5)


def test_nothing_is_left_over_from_before(recipe: Callable[..., TrainConfig]) -> None:
    """Everything static is poison before each step: inputs, what is reported, and the table of the update."""
    config = recipe()
    state = random_state(config)
    step = recorded_step(state, config, RecordingCapture())
    go(step, config, *range(3))
    assert step.graphs is not None
    assert isinstance(step.update, FusedUpdate)
    for i in range(3, 6):
        for static in step.graphs.static.values():
            for part in static.parts:
                for name in ("tokens", "targets", "t_model", "labels", "latent_size"):
                    poison(getattr(part, name))
            poison(static.losses)
            poison(static.norm)
        poison(step.update.fused.counters)
        poison(step.update.fused.lr)
        go(step, config, i)
    assert bits(state) == bits(eager(config, *range(6)))


def test_what_is_static_stays_where_it_is_and_nothing_grows(recipe: Callable[..., TrainConfig]) -> None:
    config, capture = recipe("compute.dtype=bfloat16"), RecordingCapture()
    state = random_state(config)
    step = recorded_step(state, config, capture)
    go(step, config, *range(4))

    assert step.graphs is not None
    gradients = step.graphs._gradients

    def found() -> tuple[list[int], int]:
        gc.collect()
        tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        return [x.data_ptr() for x in (*step.model.parameters(), *state.model.parameters(), *gradients)], tensors

    addresses, tensors = found()
    go(step, config, *range(4, 8))
    assert found()[0] == addresses
    assert found()[1] <= tensors  # fewer: what another test left behind has gone meanwhile
    assert (capture.captured, capture.replayed) == (3, 8)
    assert not flat(gradients).any(), "they are zeros between steps"
    assert {x.dtype for x in gradients} == {torch.bfloat16}, "of one part they are taken as they were computed"
    assert all(p.grad is None for model in (state.model, step.model) for p in model.parameters())


def test_a_step_that_is_not_finite_changes_nothing(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    state = random_state(config)
    step = recorded_step(state, config, RecordingCapture())
    go(step, config, 0)
    before, batch = bits(state), batch_of(config, 3)
    batch.tokens[1, 2] = math.nan
    assert not step(batch, 1e-3).finite
    assert bits(state) == before
    go(step, config, 3)
    assert bits(state) == bits(eager(config, 0, 3))


def test_steps_with_and_without_graphs_take_turns(recipe: Callable[..., TrainConfig]) -> None:
    """On one state: each counts what the other did."""
    config = recipe()
    state = random_state(config)
    steps = recorded_step(state, config, RecordingCapture()), step_of(state, config, fused=True)
    for i, which in enumerate((0, 1, 1, 0, 0)):
        go(steps[which], config, i)
    assert bits(state) == bits(eager(config, *range(5)))


# --- capture -----------------------------------------------------------------------------------------------


def test_a_capture_runs_steps_that_count_for_nothing(recipe: Callable[..., TrainConfig]) -> None:
    """The recording compares every bit that a step may change; with the gate open it finds that it did."""
    config = recipe()
    step = recorded_step(random_state(config), config, RecordingCapture())
    step.update.shut = nullcontext  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="a capture has changed what it must keep"):
        go(step, config, 0)


def test_a_capture_that_fails_is_an_error_and_no_harm(recipe: Callable[..., TrainConfig]) -> None:
    """In the step of the second shape: the same step may be asked for again, or goes on without graphs."""
    config = recipe(*KINDS["parts"])
    expected = bits(eager(config, *range(3)))
    for again in (True, False):
        state = random_state(config)
        step = recorded_step(state, config, RecordingCapture(fail_at=1))
        go(step, config, 0)
        before = bits(state)
        said = (
            r"^graphs: a step could not be captured: failed on purpose; the same command continues with compute\.graphs"
        )
        with pytest.raises(CaptureError, match=said):
            go(step, config, 1)
        assert bits(state) == before
        if not again:
            step.graphs = None
        go(step, config, 1, 2)
        assert bits(state) == expected


def test_close_and_begin_again(recipe: Callable[..., TrainConfig]) -> None:
    config, capture = recipe(), RecordingCapture()
    state = random_state(config)
    step = recorded_step(state, config, capture)
    go(step, config, 0)
    assert step.graphs is not None
    step.graphs.close()
    assert not capture.graphs
    assert not step.graphs.static
    go(step, config, 3)
    assert (capture.captured, capture.replayed) == (2, 2)
    assert bits(state) == bits(eager(config, 0, 3))


# --- at the door -------------------------------------------------------------------------------------------


def test_a_step_is_of_the_recipe_and_of_the_types_that_were_captured(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    state = random_state(config)
    step = recorded_step(state, config, RecordingCapture())
    go(step, config, 0)
    before, batch = bits(state), batch_of(config, 3)
    for wrong, said in (
        (replace(batch, t_model=batch.t_model.double()), "t_model: got torch.float64, expected torch.float32 as capt"),
        (replace(batch, labels=None), "labels: got none, expected some as captured"),
        (replace(batch, targets=batch.targets[1:]), "targets: got shape"),
        (batch_of(recipe("batch_size=5"), 0), r"batch: got parts of \[5\] images .*, expected one of its 3 shapes"),
    ):
        with pytest.raises(ValueError, match=said):
            step(wrong, 1e-3)
    with pytest.raises(ValueError, match=r"batch: got parts of \[2, 2\] images"):
        step(batch, 1e-3, parts=2)
    assert bits(state) == before


def test_where_there_are_none_they_are_refused(recipe: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config, cuda = recipe("compute.graphs=true"), torch.device("cuda")
    said = "compute.graphs: got true, expected false: "
    with pytest.raises(ConfigError, match=said + "a cpu has none"):
        loop.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists(), "before anything is written"
    with pytest.raises(ConfigError, match=said + "2 ranks exchange gradients in the middle of a step"):
        refuse_graphs("triton", Ranks(0, 2, cuda, control=object()), cuda)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=said + "with backend=torch the host decides in the middle of a step"):
        refuse_graphs("torch", ALONE, cuda)
    refuse_graphs("triton", ALONE, cuda)
    with pytest.raises(ConfigError, match=said + "the host decides whether a step counts"):
        TrainStep(random_state(config), config, capture=RecordingCapture())

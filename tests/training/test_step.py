"""The step: in parts, in bfloat16, with less kept, compiled; and that a step which is not finite changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pixelflow_engine.errors import BackendUnavailableError, ConfigError
from pixelflow_training import loop
from pixelflow_training.collate import Batch
from pixelflow_training.config import TrainConfig
from pixelflow_training.plan import parts_of_step
from pixelflow_training.state import TrainState
from pixelflow_training.step import TrainStep, batch_losses
from support.recipes import tiny_recipe
from support.steps import batch_of, bits, flat, random_state

THREE_STAGES = ("scheduler.num_stages=3", "batch_size=7", "model.depth=2")


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, *THREE_STAGES, *overrides)


def trained(config: TrainConfig, steps: int = 3) -> TrainState:
    """After some steps at one learning rate."""
    state = random_state(config)
    step = TrainStep(state, config)
    for i in range(steps):
        assert step(batch_of(config, i), 1e-3).finite
    return state


def taken_by(step: TrainStep) -> list[Tensor]:
    """Where a step puts its gradients from now on instead of moving the weights."""
    taken: list[Tensor] = []
    step.update.finish = lambda finite: taken.append(flat(p.grad for p in step.state.model.parameters()))  # type: ignore[method-assign]
    return taken


# --- parts -------------------------------------------------------------------------------------------------


def test_parts_have_every_image_once_and_no_more_tokens_than_allowed(recipe: Callable[..., TrainConfig]) -> None:
    for most, step in ((16, 0), (32, 5), (100, 1), (10_000, 2)):
        config = recipe("batch_size=25", f"compute.max_tokens={most}")
        whole = batch_of(config, step)
        lengths = [rows * columns for rows, columns in whole.layout.grids]
        count = parts_of_step(config, step)
        parts = whole.parts(count)
        assert len(parts) == count
        assert max(part.layout.num_tokens for part in parts) <= most
        assert count == 1 or max(sum(lengths[i :: count - 1]) for i in range(count - 1)) > most, "fewer would do"
        assert sorted(image for part in parts for image in images_of(part)) == sorted(images_of(whole))


def test_all_ranks_have_as_many_parts_and_none_too_many_tokens(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("batch_size=25", "compute.max_tokens=40")
    for step in range(3):
        count = parts_of_step(config, step, world_size=3)
        shares = [batch_of(config, step, rank, 3) for rank in range(3)]
        assert 1 < count < parts_of_step(config, step)
        assert max(part.layout.num_tokens for share in shares for part in share.parts(count)) <= 40


def images_of(batch: Batch) -> list[tuple[object, ...]]:
    """All that is known of each image."""
    assert batch.labels is not None
    ends = batch.layout.cu_seqlens.tolist()
    return [
        (
            batch.layout.grids[i],
            *(x[ends[i] : ends[i + 1]].numpy().tobytes() for x in (batch.tokens, batch.targets)),
            *(x[i].numpy().tobytes() for x in (batch.t_model, batch.labels, batch.latent_size, batch.stage)),
        )
        for i in range(batch.layout.num_images)
    ]


def test_a_step_in_parts_is_the_step_in_one(recipe: Callable[..., TrainConfig]) -> None:
    """Gradients are sums of the same terms in another order; in float64 nothing else can be seen."""
    config = recipe("optimizer.max_grad_norm=1e9")
    batch, gradients = batch_of(config), []
    for parts in (1, 3):
        state = random_state(config)
        state.model.double()
        step = TrainStep(state, config)
        step.model = step._velocities = state.model  # in float64, too
        taken = taken_by(step)
        done = step(batch, 1e-3, parts)
        assert [value is None for value in done.stage_loss] == [s not in batch.stage for s in range(3)]
        assert done.tokens == batch.layout.num_tokens
        assert done.loss == pytest.approx(batch_losses(state.model, batch).mean().item(), rel=1e-6)
        gradients.append(taken[0])
    one, three = gradients
    assert (one - three).abs().max() < 1e-13 * one.abs().max()


# --- precision ---------------------------------------------------------------------------------------------


def test_weights_are_float32_and_their_copy_follows(recipe: Callable[..., TrainConfig]) -> None:
    """A step of 1e-6 is lost on bfloat16 weights; on float32 ones it adds up."""
    config = recipe("compute.dtype=bfloat16")
    state = random_state(config)
    step = TrainStep(state, config)
    assert step.model is not state.model
    assert step.model.dtype == torch.bfloat16
    before = flat(state.model.parameters())
    for _ in range(5):
        assert step(batch_of(config), 1e-6).finite
    moved = (flat(state.model.parameters()) - before).abs()
    assert state.model.dtype == torch.float32
    assert (moved > 1e-6).float().mean() > 0.5, "each step moves a weight by about a learning rate"
    for mine, theirs in zip(state.model.parameters(), step.model.parameters(), strict=True):
        assert torch.equal(mine.detach().bfloat16(), theirs)
    assert {x.dtype for x in state.tensors()["optimizer"].values()} == {torch.float32}
    assert {x.dtype for x in state.tensors()["ema"].values()} == {torch.float32}


def test_bfloat16_gradients_are_as_near_to_the_truth_as_autocast_ones(recipe: Callable[..., TrainConfig]) -> None:
    """The measure is PyTorch's own mixed precision on the same weights: twice its distance from float64 (level D)."""
    config = recipe("compute.dtype=bfloat16", "optimizer.max_grad_norm=1e9")
    state, batch = random_state(config), batch_of(config)
    truth, plain = copy.deepcopy(state.model).double(), copy.deepcopy(state.model)
    batch_losses(truth, batch).mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = batch_losses(plain, batch).mean()
    loss.backward()
    step = TrainStep(state, config)
    taken = taken_by(step)
    step(batch, 1e-3)
    expected, autocast = (flat(p.grad for p in model.parameters()) for model in (truth, plain))
    unit = 2.0**-8  # of bfloat16
    allowed = 2 * (autocast - expected).norm() + 2 * unit * expected.norm()
    assert (taken[0] - expected).norm() <= allowed
    assert (taken[0] - expected).norm() > 1e-4 * expected.norm(), "nothing was computed in bfloat16"


def test_gradients_of_parts_are_added_up_in_float32(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("compute.dtype=bfloat16", "optimizer.max_grad_norm=1e9")
    state, batch = random_state(config), batch_of(config)
    step = TrainStep(state, config)
    taken = taken_by(step)
    step(batch, 1e-3, parts=3)
    total = torch.zeros_like(taken[0])
    for part in batch.parts(3):
        (batch_losses(step.model, part).sum() / batch.layout.num_images).backward()
        total = (total.float() + flat(p.grad for p in step.model.parameters()).float()).double()
        step.model.zero_grad()
    assert torch.equal(taken[0], total)


# --- less kept ---------------------------------------------------------------------------------------------


def kept_bytes(config: TrainConfig) -> int:
    """What a forward pass keeps for its backward pass, weights apart."""
    return kept_by(TrainStep(random_state(config), config), batch_of(config))


def kept_by(step: TrainStep, batch: Batch) -> int:
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in step.model.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses = batch_losses(step.model, batch)
    del losses
    return sum(kept.values())


def test_what_is_computed_again_is_the_same_to_the_bit_and_is_not_kept(recipe: Callable[..., TrainConfig]) -> None:
    plain = bits(trained(recipe()))
    assert bits(trained(recipe("compute.recompute=blocks"))) == plain
    assert bits(trained(recipe("compute.recompute=pointwise"))) == plain
    assert kept_bytes(recipe("compute.recompute=blocks")) < kept_bytes(recipe()) / 2


def compiled_doing_nothing(function: Any, **options: Any) -> Any:
    """In the place of compilation: what is put around a block must not depend on what is made of it."""
    return function


def test_compiled_blocks_keep_as_little(recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", compiled_doing_nothing)
    compiled = ("compute.compile=true", "model.depth=4")
    whole = kept_bytes(recipe(*compiled))
    assert kept_bytes(recipe(*compiled, "compute.recompute=blocks")) < whole / 2


def test_products_are_not_computed_again_where_only_pointwise_operations_are(
    recipe: Callable[..., TrainConfig],
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for what in ("nothing", "pointwise", "blocks"):
        config = recipe(f"compute.recompute={what}")
        state, batch = random_state(config), batch_of(config)
        step = TrainStep(state, config)
        with FlopCounterMode(display=False) as counter:
            step(batch, 0.0)
        counts[what] = counter.get_total_flops()
    assert counts["nothing"] == counts["pointwise"] < counts["blocks"]


def test_compiled_blocks_have_the_same_gradients(recipe: Callable[..., TrainConfig]) -> None:
    """Sums in another order: u = 6e-8 for each of the hundred or so operations between a weight and the loss.

    Computed again, what the compiler has kept of a block is kept no more.
    """
    gradients, kept = [], []
    for compiled, again in (("false", "nothing"), ("true", "nothing"), ("true", "blocks")):
        config = recipe(
            "model.depth=1", f"compute.compile={compiled}", f"compute.recompute={again}", "optimizer.max_grad_norm=1e9"
        )
        step = TrainStep(random_state(config), config)
        assert (type(step.model.operations).__name__ == "KnownPackOperations") == (compiled == "true")
        gradients.append(taken_by(step))
        step(batch_of(config), 1e-3)
        kept.append(kept_by(step, batch_of(config)))
    (plain,), *others = gradients
    for (ours,) in others:
        assert (ours - plain).norm() <= 6e-6 * plain.norm()
    assert kept[2] < kept[1] < kept[0]


# --- at the door, and what is not finite --------------------------------------------------------------------


def test_a_step_that_is_not_finite_changes_nothing(recipe: Callable[..., TrainConfig]) -> None:
    for overrides in ((), ("compute.dtype=bfloat16",)):
        config = recipe(*overrides)
        state, batch = random_state(config), batch_of(config)
        step = TrainStep(state, config)
        assert step(batch, 1e-3).finite
        before, computing = bits(state), flat(step.model.parameters())
        batch.tokens[3, 1] = math.inf
        done = step(batch, 1e-3)
        assert not done.finite
        assert bits(state) == before
        assert torch.equal(flat(step.model.parameters()), computing)
        assert all(p.grad is None for model in (state.model, step.model) for p in model.parameters())


def test_what_cannot_run_is_refused(recipe: Callable[..., TrainConfig]) -> None:
    with pytest.raises(BackendUnavailableError, match="backend: 'flash' cannot run"):
        TrainStep(random_state(recipe()), recipe("compute.backend=flash"))
    with pytest.raises(ConfigError, match="max_tokens: got 15, expected at least 16"):
        recipe("compute.max_tokens=15")
    with pytest.raises(ConfigError, match="recompute: got pointwise"):
        recipe("compute.compile=true", "compute.recompute=pointwise")
    with pytest.raises(ConfigError, match=r"compute\.dtype: got 'float16'"):
        recipe("compute.dtype=float16")
    with pytest.raises(ValueError, match="device: got 'cuda:9'"):
        loop.train(recipe("compute.device=cuda:9"), Path("nowhere"), quiet=True)

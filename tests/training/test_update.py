"""What moves the weights: both ways are AdamW within float32's rounding, count alike, and can take turns.

Without the interpreter the fused update runs by its operations' plain implementation, whose bits the kernels have
(``tests/kernels/test_adamw_interpret.py``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pixelflow_training.checkpoint import Checkpointer
from pixelflow_training.config import TrainConfig
from pixelflow_training.ranks import join
from pixelflow_training.state import TrainState
from pixelflow_training.update import LARGEST_CLIP, FusedUpdate, TorchUpdate
from support.ranks import in_ranks, said
from support.recipes import tiny_recipe
from support.steps import Watched, batch_of, bits, flat, pieces, random_state, step_of

DECAYING = ("scheduler.num_stages=3", "batch_size=7", "model.depth=2", "optimizer.weight_decay=0.3")


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: tiny_recipe(tmp_path, *DECAYING, *overrides)


# --- AdamW and its average ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_are_adamws(recipe: Callable[..., TrainConfig], fused: bool, dtype: str, parts: int) -> None:
    """Against float64, from the gradients that the update was given: level D, by counting roundings."""
    config = recipe(f"compute.dtype={dtype}", *(["compute.max_tokens=32"] if parts > 1 else []))
    state = random_state(config)
    step, watched = step_of(state, config, fused), Watched(state, config)
    for i, lr in enumerate((1e-3, 2e-3, 5e-4)):
        watched.step(step, batch_of(config, i), lr, parts)
    watched.check()
    if dtype == "bfloat16":
        for master, computing in zip(state.model.parameters(), step.model.parameters(), strict=True):
            assert torch.equal(master.detach().bfloat16(), computing)
    assert all(p.grad is None for model in (state.model, step.model) for p in model.parameters())


def test_two_hundred_fused_steps_are_adamws_and_their_curve_is_that_of_pytorchs(tmp_path: Path) -> None:
    """Weights, moments and averages stay within the roundings that so many steps may have made (level D).

    Losses are apart from those of PyTorch's update, whose roundings training magnifies, by less than a tenth of what
    another seed of the data does; the mean of fifty steps, of which one seed's differ by as much.
    """
    curves = []
    for fused, seed in ((True, 0), (False, 0), (False, 1)):
        config = tiny_recipe(tmp_path, "optimizer.weight_decay=0.1", "batch_size=4", f"seed={seed}")
        state = random_state(config)
        step, losses = step_of(state, config, fused), []
        watched = Watched(state, config) if fused else None
        for i in range(200):
            batch = batch_of(config, i)
            done = watched.step(step, batch, 2e-3) if watched else step(batch, 2e-3)
            losses.append(done.loss)
        if watched:
            watched.check()
        curves.append(torch.tensor(losses).view(4, 50).mean(1))
    ours, theirs, others = curves
    assert ours[-1] < 0.9 * ours[0], "nothing was learned"
    assert (ours - theirs).abs().max() < 0.1 * (theirs - others).abs().max()


def test_gradients_of_one_part_are_taken_as_they_were_computed(recipe: Callable[..., TrainConfig]) -> None:
    """Of several they are summed in float32; PyTorch's update wants them so in any case."""
    for fused, parts, expected in ((True, 1, torch.bfloat16), (True, 3, torch.float32), (False, 1, torch.float32)):
        config = recipe("compute.dtype=bfloat16", *(["compute.max_tokens=32"] if parts > 1 else []))
        step, seen = step_of(random_state(config), config, fused), []
        honest = step.update.launch
        step.update.launch = lambda losses, model, zero=False: (  # type: ignore[method-assign]
            seen.append({p.grad.dtype for p in model.parameters()}) or honest(losses, model, zero)  # noqa: B023
        )
        step(batch_of(config), 1e-3, parts)
        assert seen == [{expected}]


def test_a_norm_that_is_not_clipped(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("optimizer.max_grad_norm=1.0e+30")
    state = random_state(config)
    step, watched = step_of(state, config, fused=True), Watched(state, config)
    assert isinstance(step.update, FusedUpdate)
    assert step.update.fused.settings[4] == LARGEST_CLIP < math.inf
    watched.step(step, batch_of(config), 1e-3)
    watched.check()


# --- taking turns ------------------------------------------------------------------------------------------


def test_a_run_may_change_between_them(recipe: Callable[..., TrainConfig]) -> None:
    """Moments, averages and both corrections for the beginning go on: float64 knows of no change."""
    config = recipe()
    state = random_state(config)
    steps, watched = [step_of(state, config, fused) for fused in (False, True)], Watched(state, config)
    for i, fused in enumerate((0, 1, 1, 0, 0, 1)):
        watched.step(steps[fused], batch_of(config, i), 2e-3)
    watched.check()


@pytest.mark.parametrize("fused", [False, True])
def test_checkpoints_are_the_same_either_way(recipe: Callable[..., TrainConfig], tmp_path: Path, fused: bool) -> None:
    """Saved by one, gone on by the other: the bits of a process that changed without a checkpoint."""
    config = recipe("compute.dtype=bfloat16")
    first, state = random_state(config), random_state(config)
    kept = {name: [*group] for name, group in first.tensors().items()}
    for one in (first, state):
        step = step_of(one, config, fused)
        for i in range(2):
            assert step(batch_of(config, i), 1e-3).finite
    assert {name: [*group] for name, group in state.tensors().items()} == kept
    with Checkpointer(tmp_path / "checkpoints", config) as checkpoints:
        checkpoints.save(first)
        checkpoints.wait()
        restored = TrainState(config, random_state(config).model)
        assert checkpoints.restore(restored)
    assert bits(restored) == bits(first)
    for one in (restored, state):
        assert step_of(one, config, not fused)(batch_of(config, 2), 1e-3).finite
    assert bits(restored) == bits(state)
    assert bits(restored) != bits(first)


def test_weights_that_were_changed_from_outside_are_followed(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe("compute.dtype=bfloat16")
    for fused in (False, True):
        step = step_of(random_state(config), config, fused)
        with torch.no_grad():
            for parameter in step.state.model.parameters():
                parameter.mul_(1.5)
        step.update.follow()
        assert torch.equal(flat(step.model.parameters()), flat(p.bfloat16() for p in step.state.model.parameters()))


# --- what is not finite ------------------------------------------------------------------------------------


def nan_token(step: Any, batch: Any) -> None:
    batch.tokens[3, 1] = math.nan


def huge_target(step: Any, batch: Any) -> None:
    """The loss is infinite, but no difference is: 2e19 squared."""
    batch.targets[3, 1] = 2e19


def nan_gradient(step: Any, batch: Any) -> None:
    """Of one value, while all losses are finite."""
    weight = step.model.proj_out_2.weight

    def spoil(p: Tensor) -> None:
        p.grad.view(-1)[5] = math.nan

    step.hook = weight.register_post_accumulate_grad_hook(spoil)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spoil", [nan_token, huge_target, nan_gradient])
def test_what_is_not_finite_changes_nothing(
    recipe: Callable[..., TrainConfig], spoil: Callable[..., None], dtype: str
) -> None:
    config = recipe(f"compute.dtype={dtype}")
    state, untouched = random_state(config), random_state(config)
    step, other = (step_of(one, config, fused=True) for one in (state, untouched))
    for one in (step, other):
        assert one(batch_of(config), 1e-3).finite
    before, computing = bits(state), flat(step.model.parameters())
    batch = batch_of(config, 1)
    spoil(step, batch)
    assert not step(batch, 1e-3).finite
    if hasattr(step, "hook"):
        step.hook.remove()
    assert bits(state) == before
    assert torch.equal(flat(step.model.parameters()), computing)
    for one in (step, other):  # as if it had never been
        assert one(batch_of(config, 2), 1e-3).finite
    assert bits(state) == bits(untouched)


def test_a_loss_counts_that_no_gradient_tells_of(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    state = random_state(config)
    update = step_of(state, config, fused=True).update
    before = bits(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for loss in (math.inf, -math.inf, math.nan):
        update.prepare(1e-3)
        norm = update.launch(torch.tensor([1.0, loss, 3e38, 3e38]), state.model)
        assert norm.isfinite()
        update.finish(False)
        assert bits(state) == before
    update.prepare(1e-3)
    update.launch(torch.tensor([1.0, 3e38, 3e38, 3e38]), state.model)  # whose sum is no float32
    update.finish(True)
    assert bits(state) != before


def test_a_parameter_without_a_gradient_is_named(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    update = step_of(random_state(config), config, fused=True).update
    with pytest.raises(ValueError, match=r"^gradients: got none for patch_embed\.proj\.weight, expected one for every"):
        update.launch(torch.ones(1), update.state.model)  # type: ignore[attr-defined]


# --- several ranks -----------------------------------------------------------------------------------------


def steps_of_ranks(folder: Path, overrides: list[str]) -> None:
    """For :func:`in_ranks`: everything that ranks must agree in; an error is what fails."""
    with join(tiny_recipe(folder / os.environ["RANK"], *DECAYING, *overrides)) as ranks:
        config = tiny_recipe(folder / str(ranks.rank), *DECAYING, *overrides)
        state = random_state(config, ranks)
        step, watched = step_of(state, config, True, ranks), Watched(state, config)

        def share(i: int) -> Any:
            return batch_of(config, i, ranks.rank, ranks.world_size)

        # Parts of an image each; a rank whose share is smaller has one part less, and computes its smallest image.
        computed: list[int] = []
        hook = step.model.register_forward_pre_hook(lambda model, given: computed.append(given[0].shape[0]))
        watched.step(step, share(0), 1e-3, parts=len(share(0).layout.grids) + ranks.rank)
        hook.remove()
        lengths = [rows * columns for rows, columns in share(0).layout.grids]
        assert computed == lengths + [min(lengths)] * ranks.rank, (computed, lengths)
        watched.step(step, share(1), 2e-3)
        watched.check()
        # A loss that is infinite on one rank alone, while no gradient is.
        before = [x.clone() for x in pieces(step.update.state.model.parameters())]  # type: ignore[attr-defined]
        batch = share(2)
        if ranks.rank == 1:
            huge_target(step, batch)
        assert not step(batch, 1e-3).finite
        after = pieces(state.model.parameters())
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        # Evaluation is the average's business, in float32 whoever trains in what.
        batch = share(3)
        given = (batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels)
        with torch.no_grad():
            assert state.ema.model(*given).dtype == torch.float32
            assert step.model(*given).dtype == getattr(torch, config.compute.dtype)
        gathered: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(gathered, [x.sum().item() for x in after], group=ranks.control)
        assert all(found == gathered[0] for found in gathered)
        (folder / f"done-{ranks.rank}.json").write_text(json.dumps(state.ema.step))


@pytest.mark.parametrize("shard", [1, 2])
def test_ranks_agree_on_the_device(tmp_path: Path, shard: int) -> None:
    """Weights on each rank, and spread over both by rows that do not divide: the whole model's norm, AdamW's steps."""
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    overrides = [f"compute.shard={shard}", "compute.dtype=bfloat16"]
    assert in_ranks(2, tmp_path, steps_of_ranks, overrides) == [0, 0], said(tmp_path, 0) + said(tmp_path, 1)
    assert [json.loads((tmp_path / f"done-{rank}.json").read_text()) for rank in (0, 1)] == [2, 2]


def test_the_backend_chooses(recipe: Callable[..., TrainConfig]) -> None:
    config = recipe()
    assert type(step_of(random_state(config), config, fused=False).update) is TorchUpdate

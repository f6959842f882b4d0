"""The training loop: plan -> images -> pack -> velocity -> loss -> step -> EMA -> checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pixelflow_engine.checkpoint import save_checkpoint
from pixelflow_engine.model import PackedTransformer

from .checkpoint import Checkpointer
from .collate import Batch, make_batch
from .config import OptimizerConfig, TrainConfig
from .data import ImageSource, Loader, SkippedImages, TrainingImages, augment, open_data
from .draws import Purpose, new_seed
from .files import replace_text
from .loss import image_losses
from .plan import plan_held_out, plan_step
from .run import RunDirectory
from .signals import StopRequests, TrainingStopped
from .state import TrainState


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step (from 0): linear rise, then constant or a half cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_model(config: TrainConfig) -> PackedTransformer:
    """A freshly drawn model; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(new_seed(config.seed, Purpose.WEIGHTS))
        model = PackedTransformer(config.model)
        model.initialize()
    return model


def training_batch(config: TrainConfig, data: TrainingImages, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """The batch of a step, or a rank's share of it: a pure function of the recipe, the images and these numbers."""
    plan = plan_step(config, step, len(data), rank, world_size)
    taken = data.take(plan)
    images = augment(taken.images, config.data.augment, plan.affine)
    return replace(make_batch(images, taken.labels, plan, config.network), skipped=taken.skipped)


def held_out_batches(config: TrainConfig, data: TrainingImages) -> Iterator[Batch]:
    """Every held-out image once, in parts of at most ``batch_size``, with draws that never change."""
    parts = math.ceil(len(data) / config.batch_size)
    for part in range(parts):
        plan = plan_held_out(config, len(data), part, parts)
        taken = data.take(plan)
        yield replace(make_batch(taken.images, taken.labels, plan, config.network), skipped=taken.skipped)


def batch_losses(model: PackedTransformer, batch: Batch) -> Tensor:
    """Loss of each image of a batch, ``[n]``."""
    velocities = model(batch.tokens, batch.t_model, batch.layout, batch.latent_size, batch.labels)
    return image_losses(velocities, batch.targets, batch.layout)


def per_stage(losses: Tensor, stage: Tensor, num_stages: int) -> list[float | None]:
    """Mean loss of each stage; None for a stage without images."""
    members = [losses[stage == s] for s in range(num_stages)]
    return [part.mean().item() if len(part) else None for part in members]


@torch.no_grad()
def held_out_loss(model: PackedTransformer, batches: list[Batch], num_stages: int) -> list[float | None]:
    """Mean loss of each stage over held-out images."""
    losses = torch.cat([batch_losses(model, batch) for batch in batches])
    return per_stage(losses, torch.cat([batch.stage for batch in batches]), num_stages)


def train(
    config: TrainConfig,
    output: Path,
    quiet: bool = False,
    *,
    fresh: bool = False,
    from_step: int | None = None,
    source: ImageSource | None = None,
) -> Path:
    """Train on the CPU and write the averaged model; go on where a run was stopped or broke off.

    A run that goes on ends with the weights, averages, moments and log (but for its times) of one that never stopped,
    bit for bit, on the same machine with the same versions. Its recipe may differ only in keys that change no number.

    Args:
        config: the recipe.
        output: run directory; see :class:`RunDirectory` for what it gets. If it holds checkpoints, the run goes on from
            the last one. **They must be your own**: loading one runs whatever code its author put there.
        quiet: no progress bar.
        fresh: refuse a directory that holds anything.
        from_step: go on from the checkpoint of this step instead of the last one; later ones are deleted.
        source: images of your own, instead of those that ``data.name`` and ``data.path`` say.

    Returns:
        the checkpoint's folder, ``output/model``.

    Raises:
        FileExistsError: ``output`` holds a run that cannot go on, or another process trains there.
        CheckpointError: the checkpoint is damaged or missing; nothing is lost, and ``from_step`` chooses another one.
        ConfigError: the checkpoint is of another recipe, or the images do not suit the model.
        ValueError: more than ``data.max_skipped`` images could not be read; the log has names and reasons.
        OSError: a checkpoint could not be saved; the one before it is as it was. Or the data cannot be read.
        ChildProcessError: a process that reads images has ended unexpectedly.
        FloatingPointError: more than ``guard.max_skipped`` steps in a row had a loss or gradient that is not finite;
            ``output/nonfinite.json`` has their samples.
        TrainingStopped: a signal came; everything is saved.
    """
    num_stages = config.scheduler.num_stages
    train_set, held_out = open_data(config, source)
    state = TrainState(config, build_model(config))
    model, ema, optimizer = state.model, state.ema, state.optimizer
    with ExitStack() as stack:
        run = stack.enter_context(RunDirectory(output, fresh))
        checkpoints = stack.enter_context(Checkpointer(run.checkpoints, config))
        begin_or_go_on(run, checkpoints, state, config, from_step)
        log = stack.enter_context(run.open_log(state.step))
        skipped = SkippedImages(log, config.data.max_skipped)
        evaluation = list(held_out_batches(config, held_out))
        for batch in evaluation:
            skipped.add(state.step, batch.skipped)
        stop = stack.enter_context(StopRequests())
        data = stack.enter_context(Loader(train_set, config, state.step))
        bar = stack.enter_context(tqdm(total=config.steps, initial=state.step, disable=quiet, unit="step"))
        lap = time.perf_counter()
        began = lap - state.seconds
        images = tokens = 0
        while state.step < config.steps:
            batch = training_batch(config, data, state.step)
            skipped.add(state.step + 1, batch.skipped)
            lr = learning_rate(config.optimizer, state.step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = batch_losses(model, batch)
            loss = losses.mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            stage_loss = per_stage(losses.detach(), batch.stage, num_stages)
            finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
            state.step += 1
            if finite:
                optimizer.step()
                ema.update(model)
                state.skipped_in_row = 0
                for spike in state.history.add(stage_loss):
                    log.write({"event": "spike", "step": state.step, **spike._asdict()})
            else:
                state.skipped += 1
                state.skipped_in_row += 1
                log.write(skipped_record(config, data, state, stage_loss, loss, norm))
            optimizer.zero_grad(set_to_none=True)
            images, tokens = images + config.batch_size, tokens + batch.layout.num_tokens
            bar.update()
            if state.skipped_in_row > config.guard.max_skipped:
                raise not_finite(run, config, data, state)

            last = state.step == config.steps
            if finite and (state.step % config.log_every == 0 or last):
                now = time.perf_counter()
                record: dict[str, object] = {
                    "event": "train",
                    "step": state.step,
                    "loss": loss.item(),
                    "stage_loss": stage_loss,
                    "grad_norm": norm.item(),
                    "lr": lr,
                    "images_per_second": images / (now - lap),
                    "tokens_per_second": tokens / (now - lap),
                    "seconds": now - began,
                }
                log.write(record)
                bar.set_postfix_str(f"loss {loss.item():.4f}, {images / (now - lap):.0f} images/s", refresh=False)
                lap, images, tokens = now, 0, 0
            if state.step % config.eval_every == 0 or last:
                paused = time.perf_counter()
                losses_held_out = held_out_loss(ema.model, evaluation, num_stages)
                log.write(
                    {
                        "event": "held_out",
                        "step": state.step,
                        "stage_loss": losses_held_out,
                        "seconds": time.perf_counter() - began,
                    }
                )
                save_checkpoint(run.model, config.network, dict(ema.model.state_dict()), overwrite=True)
                lap += time.perf_counter() - paused  # speed is that of training alone
            checkpoints.poll()
            if state.step % config.checkpoint.every == 0 or last or stop.received:
                log.sync()
                state.seconds = time.perf_counter() - began
                checkpoints.save(state)
            if stop.received and not last:
                checkpoints.wait()
                raise TrainingStopped(f"{stop.received.name}: stopped and saved after step {state.step}")
    return run.model


def begin_or_go_on(
    run: RunDirectory, checkpoints: Checkpointer, state: TrainState, config: TrainConfig, from_step: int | None
) -> None:
    """Fill the state from a checkpoint, or save its beginning: whatever has a log has a checkpoint."""
    if checkpoints.restore(state, from_step):
        run.write_recipe(config)
        return
    run.check_unused()
    run.write_recipe(config)
    checkpoints.save(state)
    checkpoints.wait()


def skipped_record(
    config: TrainConfig,
    data: TrainingImages,
    state: TrainState,
    stage_loss: Sequence[float | None],
    loss: Tensor,
    norm: Tensor,
) -> dict[str, object]:
    """The log's line of a step that changed nothing. Its numbers are text, as JSON knows no NaN."""
    return {
        "event": "skipped",
        "step": state.step,
        "loss": str(loss.item()),
        "stage_loss": [None if value is None else str(value) for value in stage_loss],
        "grad_norm": str(norm.item()),
        "samples": batch_samples(config, data, state.step - 1),
        "skipped": state.skipped,
    }


def batch_samples(config: TrainConfig, data: TrainingImages, step: int) -> list[int]:
    """Which samples the batch of a step (from 0) is made of, by number."""
    return sorted(plan_step(config, step, len(data)).sample.tolist())


def not_finite(run: RunDirectory, config: TrainConfig, data: TrainingImages, state: TrainState) -> FloatingPointError:
    """Keep the samples of the steps that were skipped in a row, and say so."""
    first = state.step - state.skipped_in_row  # from 0
    batches = [{"step": s + 1, "samples": batch_samples(config, data, s)} for s in range(first, state.step)]
    replace_text(run.nonfinite, json.dumps(batches) + "\n")
    return FloatingPointError(
        f"step {state.step}: the loss or the gradient was not finite for {state.skipped_in_row} steps in a row, and "
        f"guard.max_skipped is {config.guard.max_skipped}; their samples are in {run.nonfinite}"
    )

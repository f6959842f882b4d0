"""The training loop: plan -> images -> pack -> step -> log, model, checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pixelflow_engine.checkpoint import save_checkpoint
from pixelflow_engine.model import PackedTransformer

from .checkpoint import Checkpointer
from .collate import Batch, make_batch
from .config import OptimizerConfig, TrainConfig
from .data import ImageSource, Loader, SkippedImages, TrainingImages, augment, open_data
from .draws import Purpose, new_seed
from .files import replace_text
from .parallel import whole
from .plan import parts_of_step, plan_held_out, plan_step
from .ranks import ALONE, Ranks, join
from .run import Log, RunDirectory, Silence
from .signals import StopRequests, TrainingStopped
from .state import TrainState
from .step import Stepped, TrainStep, backend_of, batch_losses, stage_means, stage_sums


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


def held_out_batches(config: TrainConfig, data: TrainingImages, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Every held-out image once, or a rank's share, in parts of a batch or less, with draws that never change."""
    parts = math.ceil(len(data) / config.batch_size)
    for part in range(parts):
        plan = plan_held_out(config, len(data), part * world_size + rank, parts * world_size)
        taken = data.take(plan)
        yield replace(make_batch(taken.images, taken.labels, plan, config.network), skipped=taken.skipped)


@torch.no_grad()
def held_out_loss(
    model: PackedTransformer, batches: list[Batch], num_stages: int, ranks: Ranks = ALONE
) -> list[float | None]:
    """Mean loss of each stage over held-out images, of which each rank has its share."""
    losses = torch.cat([batch_losses(model, batch) for batch in batches]).tolist()
    stages = torch.cat([batch.stage for batch in batches]).tolist()
    return stage_means(ranks.total(stage_sums(losses, stages, num_stages)))


def train(
    config: TrainConfig,
    output: Path,
    quiet: bool = False,
    *,
    fresh: bool = False,
    from_step: int | None = None,
    source: ImageSource | None = None,
) -> Path:
    """Train and write the averaged model; go on where a run was stopped or broke off.

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
    with ExitStack() as stack:
        ranks = stack.enter_context(join(config))
        backend_of(config, ranks.device)  # before anything is written
        run = RunDirectory(output, fresh)
        ranks.first_does(lambda: stack.enter_context(run) and None)
        state = TrainState(config, build_model(config).to(ranks.device), ranks)
        checkpoints = stack.enter_context(Checkpointer(run.checkpoints, config, ranks, train_set.listing))
        begin_or_go_on(run, checkpoints, state, config, from_step)
        train_step = TrainStep(state, config, ranks)
        log: Log | Silence = run.open_log(state.step) if ranks.first else Silence()
        stack.enter_context(log)
        skipped = SkippedImages(log, config.data.max_skipped)
        evaluation = []
        for batch in held_out_batches(config, held_out, ranks.rank, ranks.world_size):
            note_skipped(batch, state.step, skipped, ranks)
            evaluation.append(batch.to(ranks.device))
        stop = stack.enter_context(StopRequests())
        data = stack.enter_context(
            Loader(train_set, config, state.step, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
        )
        bar = stack.enter_context(
            tqdm(total=config.steps, initial=state.step, disable=quiet or not ranks.first, unit="step")
        )
        lap = time.perf_counter()
        began = lap - state.seconds
        images = tokens = 0
        while state.step < config.steps:
            batch = training_batch(config, data, state.step, ranks.rank, ranks.world_size).to(ranks.device)
            note_skipped(batch, state.step + 1, skipped, ranks)
            lr = learning_rate(config.optimizer, state.step, config.steps)
            done = train_step(batch, lr, parts_of_step(config, state.step, ranks.world_size))
            state.step += 1
            if done.finite:
                state.skipped_in_row = 0
                for spike in state.history.add(done.stage_loss):
                    log.write({"event": "spike", "step": state.step, **spike._asdict()})
            else:
                state.skipped += 1
                state.skipped_in_row += 1
                log.write(skipped_record(config, data, state, done))
            images, tokens = images + config.batch_size, tokens + done.tokens
            bar.update()
            if state.skipped_in_row > config.guard.max_skipped:
                raise ranks.first_does(lambda: not_finite(run, config, data, state))

            last = state.step == config.steps
            if done.finite and (state.step % config.log_every == 0 or last):
                now = time.perf_counter()
                record: dict[str, object] = {
                    "event": "train",
                    "step": state.step,
                    "loss": done.loss,
                    "stage_loss": done.stage_loss,
                    "grad_norm": done.norm,
                    "lr": lr,
                    "images_per_second": images / (now - lap),
                    "tokens_per_second": tokens / (now - lap),
                    "seconds": now - began,
                }
                log.write(record)
                bar.set_postfix_str(f"loss {done.loss:.4f}, {images / (now - lap):.0f} images/s", refresh=False)
                lap, images, tokens = now, 0, 0
            if state.step % config.eval_every == 0 or last:
                paused = time.perf_counter()
                losses_held_out = held_out_loss(state.ema.model, evaluation, num_stages, ranks)
                log.write(
                    {
                        "event": "held_out",
                        "step": state.step,
                        "stage_loss": losses_held_out,
                        "seconds": time.perf_counter() - began,
                    }
                )
                export(run, state, config, ranks)
                lap += time.perf_counter() - paused  # speed is that of training alone
            told, written = ranks.total([stop.received is not None, checkpoints.is_written()])
            if written == ranks.world_size:
                checkpoints.wait()
            if state.step % config.checkpoint.every == 0 or last or told:
                log.sync()
                state.seconds = time.perf_counter() - began
                checkpoints.save(state)
            if told and not last:
                checkpoints.wait()
                name = stop.received.name if stop.received else "signal to another rank"
                raise TrainingStopped(f"{name}: stopped and saved after step {state.step}")
    return run.model


def note_skipped(batch: Batch, step: int, skipped: SkippedImages, ranks: Ranks) -> None:
    """Count and log the images that any rank could not read on the way to a step."""
    if unread := ranks.together(batch.skipped):
        ranks.first_does(lambda: skipped.add(step, unread))


def begin_or_go_on(
    run: RunDirectory, checkpoints: Checkpointer, state: TrainState, config: TrainConfig, from_step: int | None
) -> None:
    """Fill the state from a checkpoint, or save its beginning: whatever has a log has a checkpoint."""
    begins = not checkpoints.restore(state, from_step)

    def prepare() -> None:
        if begins:
            run.check_unused()
        run.write_recipe(config)

    checkpoints.ranks.first_does(prepare)
    if begins:
        checkpoints.save(state)
        checkpoints.wait()


def export(run: RunDirectory, state: TrainState, config: TrainConfig, ranks: Ranks) -> None:
    """Write the averaged model in the form that every command takes; all ranks take part."""
    tensors = {name: whole(tensor) for name, tensor in state.ema.model.state_dict().items()}
    ranks.first_does(lambda: save_checkpoint(run.model, config.network, tensors, overwrite=True))


def skipped_record(
    config: TrainConfig,
    data: TrainingImages,
    state: TrainState,
    done: Stepped,
) -> dict[str, object]:
    """The log's line of a step that changed nothing. Its numbers are text, as JSON knows no NaN."""
    return {
        "event": "skipped",
        "step": state.step,
        "loss": str(done.loss),
        "stage_loss": [None if value is None else str(value) for value in done.stage_loss],
        "grad_norm": str(done.norm),
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

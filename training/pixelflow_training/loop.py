"""The training loop: plan -> images -> pack -> step -> log, model, checkpoint."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from pixelflow_engine.model import PackedTransformer

from .ahead import Ahead
from .begin import begin_or_resume, take_first_weights
from .checkpoint import Checkpointer
from .collate import Batch, make_batch
from .config import OptimizerConfig, TrainConfig
from .data import ImageSource, Loader, SkippedImages, TrainingImages, augment, open_data
from .draws import Purpose, new_seed
from .evaluation import evaluating_operations, export, held_out_batches, held_out_loss
from .finite import Findings
from .loggers import check_loggers, followers
from .parallel import views_allowed
from .plan import parts_of_step, plan_step
from .ranks import Ranks, join
from .run import Log, RunDirectory, Silence
from .samples import save_samples
from .signals import StopRequests, TrainingStopped
from .state import TrainState
from .step import TrainStep, check_step
from .watch import Watch


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then constant, or a half cosine to zero at ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_model(config: TrainConfig) -> PackedTransformer:
    """Return a model with freshly drawn weights; torch's global generators are left unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(new_seed(config.seed, Purpose.WEIGHTS))  # and no device's
        model = PackedTransformer(config.model)
        model.initialize()
    return model


def training_batch(config: TrainConfig, data: TrainingImages, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """Build the batch of a step, or a rank's share of it: a pure function of its arguments and the images."""
    plan = plan_step(config, step, len(data), rank, world_size)
    taken = data.take(plan)
    images = augment(taken.images, config.data.augment, plan.affine)
    batch = make_batch(images, taken.labels, plan, config.network, compiled=config.compute.compile)
    return replace(batch, skipped=taken.skipped)


def train(
    config: TrainConfig,
    output: str | os.PathLike[str],
    quiet: bool = False,
    *,
    fresh: bool = False,
    from_step: int | None = None,
    source: ImageSource | None = None,
) -> Path:
    """Train a model and write its averaged weights; resume the run if it was stopped or interrupted.

    On the same machine with the same versions, a resumed run ends with the weights, averages, moments and log (except
    for its times) of a run that never stopped, bit for bit. Its recipe may differ only in the keys that
    :func:`~.manifest.check_recipe` allows, of which ``compute`` changes rounding. Sample sheets and loggers change no
    number.

    Args:
        config: the recipe.
        output: run directory, or an empty or new folder for one; see :class:`RunDirectory` for its contents. If it
            holds checkpoints, the run resumes from the last one. **They must be your own**: loading one runs whatever
            code its author put there.
        quiet: whether to omit the progress bar and the line before it.
        fresh: whether to refuse a directory that holds anything.
        from_step: resume from the checkpoint of this step instead of the last one; later checkpoints are deleted.
        source: a source of your own, used instead of the one that ``data.name`` and ``data.path`` name.

    Returns:
        the folder of the averaged model, ``output/model``.

    Raises:
        FileExistsError: ``output`` is not empty although ``fresh`` was given, holds something that is no run or a run
            that cannot be resumed, or is in use by another process.
        CheckpointError: the checkpoint is damaged or missing; nothing is lost, and ``from_step`` can select another
            one. Or ``init_from`` names no intact checkpoint.
        ConfigError: the checkpoint is of another recipe, of other images or of a later step than ``steps``; or the
            images, ``init_from``, the ranks or ``compute.graphs`` do not suit the recipe.
        BackendUnavailableError: ``compute.backend`` cannot run on the device.
        ImportError: what ``loggers`` or ``data.name`` needs is not installed.
        ValueError: more than ``data.max_skipped`` images could not be read, and the log has names and reasons; or
            ``data.held_out``, labels or images of the source are invalid, or there is no such device.
        OSError: a checkpoint could not be saved, and the previous one is intact; or the data cannot be read.
        RuntimeError: a checkpoint could not be saved for a reason other than an error of the system; likewise.
        ChildProcessError: a data-loading worker has ended unexpectedly.
        FloatingPointError: more than ``guard.max_skipped`` steps in a row had a loss or gradient that is not finite;
            ``output/nonfinite.json`` has their samples.
        RankLostError: another rank has ended or does not answer.
        TrainingStopped: a signal was received; everything is saved.
        KeyboardInterrupt: a second SIGINT was received; the previous checkpoint is intact.
    """
    output = Path(output)
    train_set, held_out = open_data(config, source)
    with ExitStack() as stack:
        ranks = stack.enter_context(join(config))
        check_step(config, ranks)  # before anything is written
        check_loggers(config)
        stack.enter_context(views_allowed())
        run = RunDirectory(output, fresh)
        model = build_model(config)
        if not ranks.first_does(lambda: run.has_checkpoints):
            take_first_weights(model, config, ranks)
        ranks.first_does(lambda: stack.enter_context(run) and None)
        state = TrainState(config, model.to(ranks.device), ranks)
        checkpoints = stack.enter_context(Checkpointer(run.checkpoints, config, ranks, train_set.listing))
        begin_or_resume(run, checkpoints, state, config, from_step, train_set.classes)
        if ranks.first_does(lambda: run.model.exists() and (from_step is not None or run.evaluated_after(state.step))):
            export(run, state, config, ranks)  # before the log, which says so, is cut
        train_step = TrainStep(state, config, ranks)
        state.ema.model.operations = evaluating_operations(config, ranks.device)
        log = open_log(run, state, config, ranks)
        stack.enter_context(log)
        note_changed(checkpoints.accepted, state.step, log)
        skipped = SkippedImages(log, config.data.max_skipped)
        evaluation = []
        for batch in held_out_batches(config, held_out, ranks.rank, ranks.world_size):
            note_skipped(batch, state.step, skipped, ranks)
            evaluation.append(batch)
        findings = Findings(config, train_set, run, log, ranks)
        stop = stack.enter_context(StopRequests())
        data = stack.enter_context(
            Loader(train_set, config, state.step, rank=ranks.rank, world_size=ranks.world_size, device=ranks.device)
        )
        ahead = Ahead(lambda step: training_batch(config, data, step, ranks.rank, ranks.world_size), config.steps)
        if ranks.first and not quiet:
            print(introduction(output, state.step, config, len(train_set), len(held_out)), file=sys.stderr)
        watch = stack.enter_context(Watch(config, state, log, ranks, quiet))

        def look(seen: Collection[str] = ()) -> None:
            """Evaluate and draw a sample sheet if due and not in ``seen``; each is logged once it is written."""
            if due(config.eval_every, state, config) and "held_out" not in seen:
                with watch.pause():
                    losses = held_out_loss(state.ema.model, evaluation, config.scheduler.num_stages, ranks)
                    export(run, state, config, ranks)
                    watch.held_out(losses)
            if due(config.samples.every, state, config) and "samples" not in seen:
                with watch.pause():
                    watch.samples(save_samples(run, state, config, ranks))

        def save() -> None:
            with watch.pause():
                log.sync()
                state.seconds = watch.seconds
                checkpoints.save(state)

        # A step may have been saved before its evaluation, or be the last step now but not when it was done.
        look(ranks.first_does(lambda: log.events(state.step)))
        while state.step < config.steps:
            batch = ahead.take(state.step)
            note_skipped(batch, state.step + 1, skipped, ranks)
            lr = learning_rate(config.optimizer, state.step, config.steps)
            begun = train_step.begin(batch, lr, parts_of_step(config, state.step, ranks.world_size))
            ahead.prepare(state.step + 1)
            done = train_step.finish(begun)
            state.step += 1
            findings.add(state, done)
            watch.step(done, lr)

            told, written = ranks.total([stop.received is not None, checkpoints.is_written()])
            if written == ranks.world_size:
                checkpoints.wait()
            if told:
                save()  # first, because the sender of the signal may not wait for an evaluation
                if state.step < config.steps:
                    checkpoints.wait()
                    name = stop.received.name if stop.received else "signal to another rank"
                    raise TrainingStopped(f"{name}: stopped and saved after step {state.step}")
            look()
            if due(config.checkpoint.every, state, config) and not told:
                save()
        checkpoints.wait()  # while signals are still handled: after this block one would end the process
    return run.model


def introduction(output: Path, step: int, config: TrainConfig, images: int, held_out: int) -> str:
    """What a run begins with, in one line."""
    classes = f"{config.model.num_classes} classes" if config.model.num_classes else "no classes"
    begins = f"goes on after step {step}" if step else "begins"
    return (
        f"{output} {begins}: {images:,} images to train on, {held_out:,} held out, {classes}; to step {config.steps:,}"
    )


def due(every: int | None, state: TrainState, config: TrainConfig) -> bool:
    """Whether an action that occurs every ``every`` steps and at the last step is due now; None is never due."""
    return every is not None and state.step > 0 and (state.step % every == 0 or state.step == config.steps)


def open_log(run: RunDirectory, state: TrainState, config: TrainConfig, ranks: Ranks) -> Log | Silence:
    """Open the run's log, cut at the state's step, on rank 0; other ranks get a log that discards everything."""
    return run.open_log(state.step, followers(config, run, state.seconds)) if ranks.first else Silence()


def note_changed(parts: list[str], step: int, log: Log | Silence) -> None:
    """Log once that a run resumes with other images: images that are held out now may have been trained on."""
    line: dict[str, object] = {"event": "data_changed", "step": step, "parts": parts}
    if parts and line not in log.records("data_changed"):
        log.write(line)


def note_skipped(batch: Batch, step: int, skipped: SkippedImages, ranks: Ranks) -> None:
    """Count and log the images that any rank could not read in preparing a step."""
    if unread := ranks.together(batch.skipped):
        ranks.first_does(lambda: skipped.add(step, unread))

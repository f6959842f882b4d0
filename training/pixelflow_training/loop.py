"""The training loop: plan -> images -> pack -> velocity -> loss -> step -> EMA -> checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm

from pixelflow_engine.checkpoint import save_checkpoint
from pixelflow_engine.model import PackedTransformer

from .collate import Batch, make_batch
from .config import OptimizerConfig, TrainConfig
from .data import ImageSet, augment, load_digits
from .draws import Purpose, new_seed
from .ema import EMA
from .loss import image_losses
from .plan import plan_held_out, plan_step


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


def training_batch(config: TrainConfig, data: ImageSet, step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """The batch of a step, or a rank's share of it: a pure function of the recipe and these numbers."""
    plan = plan_step(config, step, len(data), rank, world_size)
    images = augment(data.images[plan.sample], config.data.augment, plan.affine)
    return make_batch(images, data.labels[plan.sample], plan, config.network)


def held_out_batches(config: TrainConfig, data: ImageSet) -> Iterator[Batch]:
    """Every held-out image once, in parts of at most ``batch_size``, with draws that never change."""
    parts = math.ceil(len(data) / config.batch_size)
    for part in range(parts):
        plan = plan_held_out(config, len(data), part, parts)
        yield make_batch(data.images[plan.sample], data.labels[plan.sample], plan, config.network)


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


def train(config: TrainConfig, output: Path, quiet: bool = False) -> Path:
    """Train on the CPU and write the averaged model.

    Args:
        config: the recipe.
        output: run directory, which must not hold a run yet; gets ``recipe.yaml``, ``log.jsonl`` (one line per
            ``log_every`` steps and per evaluation, written as it happens) and ``model/``, the averaged model as of the
            last evaluation.
        quiet: no progress bar.

    Returns:
        the checkpoint's folder, ``output/model``.

    Raises:
        FileExistsError: ``output`` holds a run.
        FloatingPointError: the loss is not finite; the log names the step.
    """
    log_path, folder = output / "log.jsonl", output / "model"
    if log_path.exists() or folder.exists():
        raise FileExistsError(f"output: {output} already holds a run; give another directory")
    num_stages = config.scheduler.num_stages
    train_set, held_out = load_digits(config.data, config.resolution, config.model.in_channels)
    evaluation = list(held_out_batches(config, held_out))
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")

    model = build_model(config)
    ema = EMA(model, config.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.lr,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    began = lap = time.perf_counter()
    images = tokens = 0
    with log_path.open("x", encoding="utf-8") as log, tqdm(total=config.steps, disable=quiet, unit="step") as bar:

        def write(record: dict[str, object]) -> None:
            log.write(json.dumps(record, allow_nan=False) + "\n")
            log.flush()

        for step in range(config.steps):
            batch = training_batch(config, train_set, step)
            lr = learning_rate(config.optimizer, step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = batch_losses(model, batch)
            loss = losses.mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            if not torch.isfinite(norm):
                write({"event": "nonfinite", "step": step + 1, "loss": str(loss.item()), "grad_norm": str(norm.item())})
                raise FloatingPointError(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model)
            images, tokens = images + config.batch_size, tokens + batch.layout.num_tokens
            bar.update()

            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                now = time.perf_counter()
                record: dict[str, object] = {
                    "event": "train",
                    "step": done,
                    "loss": loss.item(),
                    "stage_loss": per_stage(losses.detach(), batch.stage, num_stages),
                    "grad_norm": norm.item(),
                    "lr": lr,
                    "images_per_second": images / (now - lap),
                    "tokens_per_second": tokens / (now - lap),
                    "seconds": now - began,
                }
                write(record)
                bar.set_postfix_str(f"loss {loss.item():.4f}, {images / (now - lap):.0f} images/s", refresh=False)
                lap, images, tokens = now, 0, 0
            if done % config.eval_every == 0 or done == config.steps:
                paused = time.perf_counter()
                losses_held_out = held_out_loss(ema.model, evaluation, num_stages)
                write(
                    {
                        "event": "held_out",
                        "step": done,
                        "stage_loss": losses_held_out,
                        "seconds": time.perf_counter() - began,
                    }
                )
                save_checkpoint(folder, config.network, dict(ema.model.state_dict()), overwrite=True)
                lap += time.perf_counter() - paused  # speed is that of training alone
    return folder

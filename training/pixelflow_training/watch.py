"""Monitoring of a run in progress: speed, progress and losses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from pixelflow_engine import flops

from .config import TrainConfig
from .plan import token_lengths
from .ranks import Ranks
from .run import Log, Silence
from .state import TrainState
from .step import Stepped

BAR = "{n_fmt}/{total_fmt} |{bar:12}| {elapsed}<{remaining}{postfix}"


class Watch:
    """Times a run, logs training and evaluation, and shows the progress bar; a context manager.

    Speed is that of training alone, over the time since the last line without the time spent in :meth:`pause`. Model
    FLOPs utilization (MFU) is the fraction of the devices' peak in bfloat16; it is omitted for a device whose peak is
    not known, and for products in another type.

    Args:
        config: the recipe.
        state: the state that is trained.
        log: the run's log; :class:`~.run.Silence` on ranks without one.
        ranks: the ranks whose devices share the work.
        quiet: whether to omit the progress bar.
    """

    def __init__(self, config: TrainConfig, state: TrainState, log: Log | Silence, ranks: Ranks, quiet: bool) -> None:
        self._config, self._state, self._log = config, state, log
        peak = peak_of(config, ranks.device)
        self._peak = None if peak is None else peak * ranks.world_size
        self._bar = tqdm(
            total=config.steps,
            initial=state.step,
            disable=quiet or not ranks.first,
            unit="step",
            bar_format=BAR,
            dynamic_ncols=True,
        )
        self._lap = time.perf_counter()
        self._began = self._lap - state.seconds
        self._images = self._tokens = self._flops = 0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Duration of the run over all its processes so far, including evaluations and saves."""
        return time.perf_counter() - self._began

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context that excludes its duration from the speed, for anything but training."""
        began = time.perf_counter()
        yield
        self._lap += time.perf_counter() - began

    def step(self, done: Stepped, lr: float) -> None:
        """Count the step that the state has just completed, and log it if a line is due."""
        config, step = self._config, self._state.step
        lengths = token_lengths(config, (step - 1) * config.batch_size, config.batch_size)
        self._images += config.batch_size
        self._tokens += done.tokens
        self._flops += flops.count(config.model, lengths).training
        self._bar.update()
        if done.finite and (step % config.log_every == 0 or step == config.steps):
            speed = self._speed()
            self._log.write(
                {
                    "event": "train",
                    "step": step,
                    "loss": done.loss,
                    "stage_loss": done.stage_loss,
                    "grad_norm": done.norm,
                    "lr": lr,
                    **speed,
                    "seconds": self.seconds,
                }
            )
            self._bar.set_postfix_str(summary(done, speed), refresh=False)

    def held_out(self, losses: Sequence[float | None]) -> None:
        """Log the mean losses of an evaluation by stage. Non-finite ones are text, because JSON has no NaN."""
        told = [loss if loss is None or math.isfinite(loss) else str(loss) for loss in losses]
        self._log.write({"event": "held_out", "step": self._state.step, "stage_loss": told, "seconds": self.seconds})

    def samples(self, found: Mapping[str, object]) -> None:
        """Log a sample sheet, given what :func:`~.samples.save_samples` returned."""
        self._log.write({"event": "samples", "step": self._state.step, **found})

    def _speed(self) -> dict[str, float]:
        """Return the speed of all ranks together since the last line, and start anew."""
        now = time.perf_counter()
        seconds = now - self._lap
        speed = {
            "images_per_second": self._images / seconds,
            "tokens_per_second": self._tokens / seconds,
            "flops_per_second": self._flops / seconds,
        }
        if self._peak is not None:
            speed["mfu"] = speed["flops_per_second"] / self._peak
        self._lap = now
        self._images = self._tokens = self._flops = 0
        return speed


def peak_of(config: TrainConfig, device: torch.device) -> float | None:
    """Return the peak FLOP/s of a rank's GPU in bfloat16; None if it is unknown or the recipe uses another type."""
    if device.type != "cuda" or config.compute.dtype != "bfloat16":
        return None
    return flops.peak_flops(torch.cuda.get_device_name(device))


def summary(done: Stepped, speed: dict[str, float]) -> str:
    """Format figures for the progress bar: loss, loss of each stage (``-`` for one without images), and speed."""
    stages = " ".join("-" if loss is None else f"{loss:.3f}" for loss in done.stage_loss)
    images, tokens, rate = (
        tqdm.format_sizeof(speed[f"{what}_per_second"], divisor=1000) for what in ("images", "tokens", "flops")
    )
    mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
    return f"loss {done.loss:.4f} ({stages}), {images} images/s, {tokens} tokens/s, {rate}FLOP/s{mfu}"

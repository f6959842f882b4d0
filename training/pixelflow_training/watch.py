"""What a run says while it goes on: how fast it is, how far, and what its losses are."""

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
    """Times a run, writes the log's lines of training and evaluation, and draws the progress bar; used inside ``with``.

    Speed is that of training alone: of the time since the last line, :meth:`pause` takes out what was spent on anything
    else. Model FLOPs utilization (MFU) is the share of the devices' peak in bfloat16; there is none for a device whose
    peak is not known, nor for products in another type.

    Args:
        config: the recipe.
        state: whose steps are told.
        log: the run's; silence on ranks that keep none.
        ranks: whose devices share the work.
        quiet: no bar.
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
        """How long the run has taken, all its goings-on together, with evaluations and saves."""
        return time.perf_counter() - self._began

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training."""
        began = time.perf_counter()
        yield
        self._lap += time.perf_counter() - began

    def step(self, done: Stepped, lr: float) -> None:
        """Count the step that the state has just done, and tell of it where a line is due."""
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
        """Tell an evaluation's mean losses by stage. One that is not finite is text, as JSON knows no NaN."""
        told = [loss if loss is None or math.isfinite(loss) else str(loss) for loss in losses]
        self._log.write({"event": "held_out", "step": self._state.step, "stage_loss": told, "seconds": self.seconds})

    def samples(self, found: Mapping[str, object]) -> None:
        """Tell of a picture, see :func:`~.samples.save_samples`."""
        self._log.write({"event": "samples", "step": self._state.step, **found})

    def _speed(self) -> dict[str, float]:
        """Of all ranks together since the last line."""
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
    """What a rank's device could do at most, FLOP/s, in the type that the recipe computes in; None if not known."""
    if device.type != "cuda" or config.compute.dtype != "bfloat16":
        return None
    return flops.peak_flops(torch.cuda.get_device_name(device))


def summary(done: Stepped, speed: dict[str, float]) -> str:
    """A line's figures for the bar: the loss, that of each stage (``-`` for one without images), and how fast it is."""
    stages = " ".join("-" if loss is None else f"{loss:.3f}" for loss in done.stage_loss)
    images, tokens, rate = (
        tqdm.format_sizeof(speed[f"{what}_per_second"], divisor=1000) for what in ("images", "tokens", "flops")
    )
    mfu = f", MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
    return f"loss {done.loss:.4f} ({stages}), {images} images/s, {tokens} tokens/s, {rate}FLOP/s{mfu}"

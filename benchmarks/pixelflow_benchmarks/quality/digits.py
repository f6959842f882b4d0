"""Evaluation of generated digits: several settings of the sampler, each over several seeds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pixelflow_benchmarks.harness.environment import environment
from pixelflow_engine import PixelFlowEngine
from pixelflow_engine.events import StageReport
from pixelflow_training.config import DataConfig
from pixelflow_training.data import load_digits

from .scores import Judge, Scores, scan_values


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One way to sample.

    Attributes:
        solver: solver of every stage.
        steps: Euler's steps, one number for every stage or one for each.
        rtol: Dopri5's relative tolerance.
        guidance_schedule, guidance_scale: the guidance weights.
    """

    solver: Literal["euler", "dopri5"] = "euler"
    steps: int | tuple[int, ...] = 10
    rtol: float = 1e-3
    guidance_schedule: Literal["stagewise", "constant"] = "stagewise"
    guidance_scale: float = 2.4

    @property
    def name(self) -> str:
        """The setting's name in tables."""
        tolerance = "" if self.rtol == 1e-3 else f" {self.rtol:g}"
        steps = f"Euler {self.steps}" if self.solver == "euler" else f"Dopri5{tolerance}"
        guidance = "no guidance" if self.guidance_scale == 1 else f"{self.guidance_schedule} {self.guidance_scale:g}"
        return f"{steps}, {guidance}"


SETTINGS = (
    Setting(steps=10),
    Setting(steps=20),
    Setting(steps=30),
    Setting(solver="dopri5"),
    Setting(steps=10, guidance_schedule="constant"),
    Setting(steps=10, guidance_schedule="constant", guidance_scale=1.5),
    Setting(steps=10, guidance_scale=1.0),
)


def sample_digits(
    engine: PixelFlowEngine, setting: Setting, count: int, seed: int, batch_size: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[tuple[StageReport, ...]]]:
    """Sample ``count`` images, the classes in turn.

    Returns:
        Images ``[N, R, R, c]``, their classes ``[N]``, and the stage reports of each batch.
    """
    classes = engine.config.model.num_classes
    labels = [i % classes for i in range(count)]
    parts, reports = [], []
    for first in range(0, count, batch_size):
        out = engine(
            labels[first : first + batch_size],
            num_inference_steps=setting.steps,
            solver=setting.solver,
            rtol=setting.rtol,
            guidance_schedule=setting.guidance_schedule,
            guidance_scale=setting.guidance_scale,
            seed=seed + first,
            output_type="np",
        )
        parts.append(np.asarray(out.images))
        reports.append(out.stages)
    return np.concatenate(parts), np.array(labels, dtype=np.int64), reports


def evaluate_digits(
    engine: PixelFlowEngine, count: int, repeats: int, batch_size: int, settings: tuple[Setting, ...], quiet: bool
) -> Iterator[dict[str, Any]]:
    """Score real digits and noise, then every setting with ``repeats`` disjoint sets of seeds.

    Yields:
        Records with ``kind`` (``environment``, ``judge``, ``real``, ``noise`` or ``generated``) and figures; see
        :class:`Scores`.
    """
    yield {"kind": "environment", **environment()}
    config = engine.config
    judge = Judge(*load_digits(DataConfig(), config.resolution, config.model.in_channels))
    svm, network = judge.held_out_accuracy()
    median, low = judge.nearest_real()
    yield {
        "kind": "judge",
        "held_out_accuracy_svm": svm,
        "held_out_accuracy_network": network,
        "train": len(judge.train),
        "held_out": len(judge.held_out),
        "held_out_nearest": median,
        "held_out_nearest_low": low,
    }
    yield {"kind": "real", **asdict(judge.score_real())}
    yield {"kind": "noise", **asdict(judge.score_noise(count))}
    with tqdm(total=repeats * len(settings), disable=quiet, unit="set") as bar:
        for repeat in range(repeats):
            for setting in settings:
                began = time.perf_counter()
                images, labels, reports = sample_digits(engine, setting, count, repeat * 1_000_000, batch_size)
                seconds = time.perf_counter() - began
                scores: Scores = judge.score(scan_values(images), labels)
                bar.update()
                yield {
                    "kind": "generated",
                    "name": setting.name,
                    **asdict(setting),
                    "repeat": repeat,
                    "count": count,
                    "evaluations": sum(stage.evaluations for stage in reports[0]),
                    "seconds": seconds,
                    **asdict(scores),
                }

"""Train, sample and score, one record at a time; existing runs and records are not made again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pixelflow_benchmarks.harness.results import Record
from pixelflow_benchmarks.quality.digits import Setting, sample_digits
from pixelflow_benchmarks.quality.scores import Judge, scan_values
from pixelflow_engine import PixelFlowEngine
from pixelflow_training.config import TrainConfig
from pixelflow_training.data import load_digits
from pixelflow_training.loop import train

from .plan import PLAN, STAGES, TRUTH, has_truth, tokens_seen, training_config

BATCH = 250
TRUTH_COUNT = 200
"""Digits of a set that are also sampled with the accurate solver, to measure the error."""


def matched_name(setting: Setting) -> str:
    """Return the name of Euler with as many evaluations as an adaptive solver took."""
    return f"Euler, evaluations of {setting.name}"


def measure_ablations(
    recipe: str, work: Path, seeds: Sequence[int], steps: int, count: int, before: Sequence[Record], quiet: bool
) -> Iterator[Record]:
    """Measure what is missing in ``before``.

    Args:
        recipe: path or name of the recipe that provides what the plan does not.
        work: folder of the run directories, ``3-stages-seed-0`` and so on.
        seeds: seeds of the trainings; each also determines its own noise, the same for everything sampled with it.
        steps: optimizer steps of each training.
        count: digits in a set.
        before: records of earlier runs.
        quiet: disable progress bars.

    Yields:
        Records of three kinds. ``judge``: quality of the judge itself. ``training``: images and tokens seen, seconds,
        and the held-out loss of each stage. ``generated``: a setting's scores, its evaluations at each stage and, where
        the solution is known, its ``error``: the root mean square difference from it, for pixels from 0 to 1.
    """
    judge: Judge | None = None
    with tqdm(total=len(seeds) * len(STAGES), disable=quiet, unit="training") as bar:
        for seed in seeds:
            for stages in STAGES:
                config = training_config(recipe, stages, seed, steps)
                folder = work / f"{stages}-stages-seed-{seed}"
                model = train(config, folder, quiet)
                if judge is None:
                    judge = Judge(*load_digits(config.data, config.resolution, config.model.in_channels))
                    yield _judge_record(judge)
                if not any(_is_of(r, "training", stages, seed) for r in before):
                    yield _training_record(config, folder)
                known = {r["name"]: r for r in before if _is_of(r, "generated", stages, seed)}
                engine = PixelFlowEngine.from_pretrained(str(model))
                for record in _sample(engine, judge, PLAN[stages], seed, count, known):
                    yield {"kind": "generated", "stages": stages, "seed": seed, **record}
                bar.update()


def _is_of(record: Record, kind: str, stages: int, seed: int) -> bool:
    return (record["kind"], record.get("stages"), record.get("seed")) == (kind, stages, seed)


def _judge_record(judge: Judge) -> Record:
    svm, network = judge.held_out_accuracy()
    return {
        "kind": "judge",
        "held_out_accuracy_svm": svm,
        "held_out_accuracy_network": network,
        "train": len(judge.train),
        "held_out": len(judge.held_out),
        "real": asdict(judge.score_real()),
    }


def _training_record(config: TrainConfig, folder: Path) -> Record:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {line["event"]: line for line in lines}
    return {
        "kind": "training",
        "stages": config.scheduler.num_stages,
        "seed": config.seed,
        "resolution": config.resolution,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "images": config.steps * config.batch_size,
        "tokens": tokens_seen(config),
        "seconds": last["train"]["seconds"],
        "held_out": last["held_out"]["stage_loss"],
    }


def _sample(
    engine: PixelFlowEngine, judge: Judge, settings: Sequence[Setting], seed: int, count: int, known: dict[str, Record]
) -> Iterator[Record]:
    first = seed * 1_000_000  # first seed of the noise, disjoint from those of the other trainings
    truth: NDArray[np.float32] | None = None
    for setting in settings:
        tries = [(setting.name, setting)]
        for name, one in tries:
            if name not in known:
                images, labels, reports = sample_digits(engine, one, count, first, BATCH)
                evaluations = np.mean([[stage.evaluations for stage in batch] for batch in reports], axis=0).tolist()
                error = None
                if has_truth(setting):
                    if truth is None:
                        truth = sample_digits(engine, TRUTH, min(count, TRUTH_COUNT), first, BATCH)[0]
                    error = float(np.sqrt(np.square(images[: len(truth)].astype(np.float64) - truth).mean()))
                known[name] = {
                    "name": name,
                    **asdict(one),
                    "count": count,
                    "evaluations": evaluations,
                    "error": error,
                    **asdict(judge.score(scan_values(images), labels)),
                }
                yield known[name]
            if one.solver == "dopri5":
                as_often = tuple(max(2, round(value)) for value in known[name]["evaluations"])
                tries.append((matched_name(setting), replace(one, solver="euler", steps=as_often)))

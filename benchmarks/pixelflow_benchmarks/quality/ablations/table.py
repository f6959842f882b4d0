"""Tables of the ablations: mean and half the range over the seeds of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pixelflow_benchmarks.harness.results import Record, Run
from pixelflow_benchmarks.harness.tables import TextTable
from pixelflow_benchmarks.quality.digits import Setting
from pixelflow_benchmarks.quality.table import spread

from .measure import matched_name
from .plan import CONSTANT, DOPRI5, EULER, FULL, KICK_OFF, NO_GUIDANCE, STAGES, STAGEWISE, UNGUIDED

SCORES = ("agreement", "Fréchet", "Fréchet, scans", "novelty")


def trainings_table(runs: Sequence[Run]) -> TextTable:
    """Tabulate the trainings of each cascade: batch size, images, tokens, seconds, and held-out loss of each stage."""
    rows = []
    for stages in STAGES:
        found = [r for r in _records(runs, "training") if r["stages"] == stages]
        first = found[0]
        rows.append(
            (
                cascade(stages, first["resolution"]),
                str(first["batch_size"]),
                f"{first['images']:,}",
                f"{first['tokens']:,}",
                spread([r["seconds"] for r in found], 0),
                ", ".join(spread([r["held_out"][s] for r in found], 4) for s in range(stages)),
            )
        )
    header = ("cascade", "images a step", "images", "tokens", "seconds", "held-out loss of each stage")
    return TextTable(_title(runs), header, tuple(rows))


def kick_off_table(runs: Sequence[Run]) -> TextTable:
    """Tabulate the scores of each cascade and guidance weight, where the weight is the same at all stages."""
    resolution = _records(runs, "training")[0]["resolution"]
    rows = [
        (cascade(stages, resolution), setting.name, *_scores(_generated(runs, stages, setting.name)))
        for setting in KICK_OFF
        for stages in STAGES
    ]
    return TextTable(_title(runs), ("cascade", "sampled by", *SCORES), tuple(rows))


def guidance_table(runs: Sequence[Run]) -> TextTable:
    """Tabulate the scores of each guidance schedule and weight."""
    settings = (NO_GUIDANCE, *STAGEWISE, *CONSTANT)
    rows = [(s.name, *_scores(_generated(runs, FULL, s.name))) for s in settings]
    return TextTable(_title(runs), ("sampled by", *SCORES), tuple(rows))


def solvers_table(runs: Sequence[Run]) -> TextTable:
    """Tabulate evaluations, distance from the solution, and scores of each solver."""
    names = [s.name for s in EULER] + [name for s in DOPRI5 for name in (s.name, matched_name(s))]
    rows = []
    for name in names:
        found = _generated(runs, FULL, name)
        evaluations = spread([sum(r["evaluations"]) for r in found], 0).removesuffix(" ± 0")
        error = spread([r["error"] for r in found], 4)
        rows.append((name.removesuffix(", stagewise 2.4"), evaluations, error, *_scores(found)))
    return TextTable(_title(runs), ("solver", "evaluations", "error", *SCORES), tuple(rows))


@dataclass(frozen=True, slots=True)
class Order:
    """A claim that one setting is better than another, by measures of which less is better.

    Attributes:
        claim: the claim in words.
        better, worse: number of stages and name of each setting.
        measures: fields of the records that are compared.
    """

    claim: str
    better: tuple[int, str]
    worse: tuple[int, str]
    measures: tuple[str, ...] = ("frechet", "frechet_scan")


def orders() -> list[Order]:
    """Return all claims that are tested; ``docs/ablations.md`` says which of them the published figures make."""

    def guided(schedule: tuple[Setting, ...], scale: float) -> tuple[int, str]:
        return FULL, next(s.name for s in schedule if s.guidance_scale == scale)

    def euler(steps: int) -> tuple[int, str]:
        return FULL, next(s.name for s in EULER if s.steps == steps)

    with_error = ("error", "frechet", "frechet_scan")
    dopri5, loose = DOPRI5
    return [
        Order("stage-wise 2.4 beats constant 1.5", guided(STAGEWISE, 2.4), guided(CONSTANT, 1.5)),
        Order("stage-wise 2.4 beats constant 2.4", guided(STAGEWISE, 2.4), guided(CONSTANT, 2.4)),
        Order("stage-wise 2.4 beats no guidance", guided(STAGEWISE, 2.4), (FULL, NO_GUIDANCE.name)),
        Order("Euler 20 beats Euler 10", euler(20), euler(10), with_error),
        Order("Euler 30 beats Euler 20", euler(30), euler(20), with_error),
        Order("Dopri5 beats Euler 30", (FULL, dopri5.name), euler(30), with_error),
        Order("Dopri5 beats Euler of its evaluations", (FULL, dopri5.name), (FULL, matched_name(dopri5)), with_error),
        Order("Dopri5 0.1 beats Euler of its evaluations", (FULL, loose.name), (FULL, matched_name(loose)), with_error),
        Order("2 stages beat 1", (2, UNGUIDED.name), (1, UNGUIDED.name)),
        Order("3 stages beat 2", (3, UNGUIDED.name), (2, UNGUIDED.name)),
    ]


def orders_table(runs: Sequence[Run]) -> TextTable:
    """Tabulate, per claim and measure, the differences between the two settings seed by seed, at equal noise."""
    names = {"error": "error", "frechet": "Fréchet", "frechet_scan": "Fréchet, scans"}
    rows = []
    for order in orders():
        better, worse = _by_seed(_generated(runs, *order.better)), _by_seed(_generated(runs, *order.worse))
        for measure in order.measures:
            digits = {"error": 4, "frechet": 2, "frechet_scan": 1}[measure]
            gains = [worse[seed][measure] - better[seed][measure] for seed in sorted(better.keys() & worse.keys())]
            held = sum(gain > 0 for gain in gains)
            rows.append(
                (
                    order.claim,
                    names[measure],
                    spread([worse[seed][measure] for seed in worse], digits),
                    spread(gains, digits),
                    f"{held} of {len(gains)}",
                    verdict(gains),
                )
            )
    header = ("order", "measure", "of the worse", "gain", "seeds", "holds")
    return TextTable(_title(runs), header, tuple(rows))


def verdict(gains: Sequence[float]) -> str:
    """Return yes or no if all seeds agree and the mean is further from zero than the range is wide; else undecided."""
    mean, width = sum(gains) / len(gains), max(gains) - min(gains)
    if abs(mean) <= width or min(gains) <= 0 <= max(gains):
        return "undecided"
    return "yes" if mean > 0 else "no"


TABLES: Mapping[str, Callable[[Sequence[Run]], TextTable]] = {
    "ablation-trainings": trainings_table,
    "ablation-kick-off": kick_off_table,
    "ablation-guidance": guidance_table,
    "ablation-solvers": solvers_table,
    "ablation-orders": orders_table,
}
"""Tables by the names that pages use."""


def cascade(stages: int, resolution: int) -> str:
    """Return the cascade's sides in pixels."""
    return " → ".join(str(resolution >> halvings) for halvings in reversed(range(stages))) + " px"


def _records(runs: Iterable[Run], kind: str) -> list[Record]:
    return [record for run in runs for record in run.of_kind(kind)]


def _generated(runs: Sequence[Run], stages: int, name: str) -> list[Record]:
    return [r for r in _records(runs, "generated") if r["stages"] == stages and r["name"] == name]


def _by_seed(records: Sequence[Record]) -> dict[int, Record]:
    return {record["seed"]: record for record in records}


def _scores(found: Sequence[Record]) -> tuple[str, ...]:
    return (
        spread([100 * r["agreement"] for r in found], 1) + " %",
        spread([r["frechet"] for r in found], 2),
        spread([r["frechet_scan"] for r in found], 1),
        spread([r["novelty"] for r in found], 2),
    )


def _title(runs: Sequence[Run]) -> str:
    judge, head = _records(runs, "judge")[0], runs[0].environment
    seeds = {record["seed"] for record in _records(runs, "training")}
    return (
        f"{len(seeds)} trainings of each cascade, {head['steps']} steps, {head['count']} digits a set (mean ± half the "
        f"range). Of {judge['train']} training digits: Fréchet {judge['real']['frechet']:.2f}, scans "
        f"{judge['real']['frechet_scan']:.1f}. torch {head['torch']}."
    )

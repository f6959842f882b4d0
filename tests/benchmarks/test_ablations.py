"""The ablations: equal work for every cascade, nothing done twice, tables that say what the records say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pixelflow_benchmarks.analysis.pages import fill
from pixelflow_benchmarks.cli import evaluate
from pixelflow_benchmarks.harness.results import Run
from pixelflow_benchmarks.quality.ablations import measure, plan, table
from pixelflow_benchmarks.quality.digits import SETTINGS, Setting
from pixelflow_engine import PixelFlowEngine
from pixelflow_training.plan import plan_step
from support.recipes import TINY_RECIPE
from support.results import run_of

# --- the plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "batch"), [(1, 35), (2, 56), (3, 80)])
def test_every_cascade_sees_the_same_tokens(stages: int, batch: int) -> None:
    config = plan.training_config("digits-two-minutes", stages, 1, plan.STEPS)
    assert (config.batch_size, config.seed, config.steps) == (batch, 1, plan.STEPS)
    assert plan.tokens_seen(config) == plan.TOKENS * plan.STEPS == 1_176_000


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tokens_are_those_of_the_steps(stages: int, steps: int) -> None:
    """Counted image by image in what the steps are planned to be."""
    config = plan.training_config("digits-two-minutes", stages, 0, steps)
    counted = 0
    for step in range(steps):
        for stage in plan_step(config, step, 1437).stage.tolist():
            counted += ((16 // 2 ** (stages - 1 - stage)) // 4) ** 2
    assert plan.tokens_seen(config) == counted


def test_the_solution_is_that_of_the_same_guidance() -> None:
    same = {setting for setting in plan.PLAN[plan.FULL] if plan.has_truth(setting)}
    assert same >= {*plan.EULER, *plan.DOPRI5}
    assert not same & {plan.NO_GUIDANCE, plan.MILD, plan.UNGUIDED, *plan.CONSTANT}
    assert plan.has_truth(Setting(steps=(4, 5, 6)))


def test_settings_have_names_of_their_own() -> None:
    for settings in (*plan.PLAN.values(), SETTINGS):
        assert len({setting.name for setting in settings}) == len(settings)


# --- the command -------------------------------------------------------------------------------------------


def ablate(folder: Path, *more: str) -> list[dict[str, Any]]:
    """Run the command and give the file's records."""
    arguments = ["--work", folder / "work", "--output", folder / "out.jsonl", "--config", folder / "tiny.yaml"]
    sizes = ["--seeds", 1, "--steps", 2, "--count", 20, "--quiet"]
    result = CliRunner().invoke(evaluate, ["ablations", *map(str, [*arguments, *sizes]), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "TRUTH_COUNT", 8)
        yield folder, ablate(folder)


def keys(records: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(r["stages"], r["seed"], r["name"]) for r in records if r["kind"] == "generated"]


def test_every_setting_of_every_cascade_is_recorded(ablated: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, records = ablated
    expected = {(stages, 0, s.name) for stages, settings in plan.PLAN.items() for s in settings}
    expected |= {(plan.FULL, 0, measure.matched_name(s)) for s in plan.DOPRI5}
    assert sorted(keys(records)) == sorted(expected)
    trained = [r for r in records if r["kind"] == "training"]
    assert [(r["stages"], r["batch_size"], r["tokens"], len(r["held_out"])) for r in trained] == [
        (1, 35, 1120, 1), (2, 56, 1120, 2), (3, 80, 160 // 3 * 21 + 1, 3),
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "work").iterdir()) == [f"{n}-stages-seed-0" for n in (1, 2, 3)]


def test_euler_is_matched_to_what_dopri5_evaluated(ablated: tuple[Path, list[dict[str, Any]]]) -> None:
    by_name = {r["name"]: r for r in ablated[1] if r["kind"] == "generated" and r["stages"] == plan.FULL}
    for setting in plan.DOPRI5:
        adaptive, fixed = by_name[setting.name], by_name[measure.matched_name(setting)]
        assert fixed["solver"] == "euler"
        assert fixed["evaluations"] == fixed["steps"] == adaptive["evaluations"]  # of one batch: whole numbers
        assert len(fixed["steps"]) == plan.FULL


def test_the_error_is_the_distance_to_the_solution(ablated: tuple[Path, list[dict[str, Any]]]) -> None:
    """Sampled here anew, one setting after the other."""
    folder, records = ablated
    engine = PixelFlowEngine.from_pretrained(str(folder / "work/3-stages-seed-0/model"))

    def images(count: int, **setting: Any) -> np.ndarray:
        labels = [i % 10 for i in range(count)]
        out = engine(labels, seed=0, guidance_scale=2.4, output_type="np", **setting).images
        return np.asarray(out, dtype=np.float64)[:8]

    truth = images(8, solver="dopri5", rtol=1e-5)  # in a batch of its own, as there: last bits depend on the size
    by_name = {r["name"]: r for r in records if r["kind"] == "generated" and r["stages"] == plan.FULL}
    for name, setting in (
        ("Euler 2, stagewise 2.4", {"num_inference_steps": 2}),
        ("Dopri5 0.1, stagewise 2.4", {"solver": "dopri5", "rtol": 0.1}),
    ):
        assert by_name[name]["error"] == np.sqrt(((images(20, **setting) - truth) ** 2).mean()) > 0
    assert all((r["error"] is None) == ("stagewise 2.4" not in r["name"]) for r in by_name.values())


def test_nothing_is_done_twice(ablated: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, records = ablated
    monkeypatch.setattr(measure, "sample_digits", None)  # whoever samples, fails
    models = {path: path.stat().st_mtime_ns for path in (folder / "work").rglob("model.safetensors")}
    again = ablate(folder)
    assert again[: len(records)] == records
    assert [r["kind"] for r in again[len(records) :]] == ["environment", "judge", "end"]
    assert models == {path: path.stat().st_mtime_ns for path in models}
    assert len(models) == 3


def test_what_is_missing_is_done_and_comes_out_the_same(
    ablated: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Cut after Dopri5 and before what is matched to it."""
    folder, records = ablated
    (tmp_path / "work").symlink_to(folder / "work")
    place = next(i for i, r in enumerate(records) if r.get("name", "").startswith("Euler, evaluations of Dopri5, "))
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records[:place]))
    again = ablate(tmp_path, "--config", str(folder / "tiny.yaml"))
    assert again[:place] == records[:place]
    ours, theirs = ([r for r in rs if r["kind"] in ("training", "generated")] for rs in (again, records))
    assert [strip(r) for r in ours] == [strip(r) for r in theirs[: len(ours)]]
    assert len(ours) == sum(r["kind"] in ("training", "generated") for r in records)


def strip(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("run", "seconds")}


def test_results_of_other_settings_are_not_mixed(ablated: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ablated
    before = (folder / "out.jsonl").read_text()
    with pytest.raises(ValueError, match=r"output: .*'count': 20.*give another file"):
        ablate(folder, "--count", "30")
    with pytest.raises(ValueError, match=r"output: got .*out\.txt, expected"):
        ablate(folder, "--output", str(folder / "out.txt"))
    assert (folder / "out.jsonl").read_text() == before


def test_pages_carry_the_tables(ablated: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = ablated
    absent = fill("<!-- table: ablation-orders none.jsonl -->\n<!-- /table -->\n", folder)
    assert "Not measured: no run of `pixelflow eval ablations` in none.jsonl." in absent
    for name in table.TABLES:
        page = fill(f"<!-- table: {name} out.jsonl -->\n<!-- /table -->\n", folder)
        assert "Of 1597 training digits" in page
        assert page.count("\n| ") > 3


# --- the tables --------------------------------------------------------------------------------------------


def generated(stages: int, seed: int, name: str, **scores: Any) -> dict[str, Any]:
    zeros = {"agreement": 0.0, "frechet": 0.0, "frechet_scan": 0.0, "novelty": 0.0, "error": 0.0, "evaluations": [1]}
    return {"kind": "generated", "stages": stages, "seed": seed, "name": name, **zeros, **scores}


def made_up(frechet: dict[str, list[float]]) -> list[Run]:
    """Three seeds in two runs; settings that are not named score 0, and 10 more for each stage that is missing."""
    places = {(stages, s.name) for stages, settings in plan.PLAN.items() for s in settings}
    places |= {(plan.FULL, measure.matched_name(s)) for s in plan.DOPRI5}
    records = [
        generated(stages, seed, name, frechet=frechet.get(name, [0.0] * 3)[seed] + 10 * (plan.FULL - stages))
        for stages, name in sorted(places)
        for seed in range(3)
    ]
    trained = [
        {"kind": "training", "stages": n, "seed": s, "resolution": 16, "batch_size": 1, "images": 1, "tokens": 1}
        | {"seconds": 10.0 + s, "held_out": [0.1 * (s + 1)] * n}
        for n in (1, 2, 3)
        for s in range(3)
    ]
    judge = {"kind": "judge", "train": 9, "real": {"frechet": 0.5, "frechet_scan": 3.0}}
    head = {"steps": 7, "count": 30}
    half = len(records) // 2
    return [
        run_of("ablations", judge, *trained, *records[:half], **head),
        run_of("ablations", judge, *records[half:], began="2026-01-02T00:00:00+00:00", **head),
    ]


@pytest.mark.parametrize(
    ("stagewise", "constant", "said"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.2, 2.4], ("2.20 ± 0.20", "1.10 ± 0.10", "3 of 3", "yes")),
        ([2.0, 2.2, 2.4], [1.0, 1.1, 1.2], ("1.10 ± 0.10", "-1.10 ± 0.10", "0 of 3", "no")),
        ([1.0, 1.0, 1.0], [1.1, 1.2, 1.9], ("1.40 ± 0.40", "0.40 ± 0.40", "3 of 3", "undecided")),
        ([1.0, 1.0, 1.0], [2.0, 2.0, 0.9], ("1.63 ± 0.55", "0.63 ± 0.55", "2 of 3", "undecided")),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], ("1.00 ± 0.00", "0.00 ± 0.00", "0 of 3", "undecided")),
    ],
)
def test_an_order_holds_where_all_seeds_say_so(
    stagewise: list[float], constant: list[float], said: tuple[str, ...]
) -> None:
    names = {"Euler 10, stagewise 2.4": stagewise, "Euler 10, constant 1.5": constant}
    rows = [row for row in table.orders_table(made_up(names)).rows if row[0] == "stage-wise 2.4 beats constant 1.5"]
    assert [row[1] for row in rows] == ["Fréchet", "Fréchet, scans"]
    assert rows[0][2:] == said


def test_rows_are_of_the_cascade_and_the_setting_that_they_name() -> None:
    runs = made_up({"Euler 10, constant 2": [1.0, 2.0, 3.0], "Euler 30, stagewise 2.4": [4.0, 4.0, 5.0]})
    guidance = {row[0]: row for row in table.guidance_table(runs).rows}
    assert guidance["Euler 10, constant 2"][2] == "2.00 ± 1.00"
    assert guidance["Euler 10, stagewise 2"][2] == "0.00 ± 0.00"
    solvers = {row[0]: row for row in table.solvers_table(runs).rows}
    assert solvers["Euler 30"][4] == "4.33 ± 0.50"
    assert solvers["Euler 20"][4] == "0.00 ± 0.00"
    kick_off = [row[:2] + row[3:4] for row in table.kick_off_table(runs).rows if row[1] == plan.UNGUIDED.name]
    assert kick_off == [
        ("16 px", plan.UNGUIDED.name, "20.00 ± 0.00"),
        ("8 → 16 px", plan.UNGUIDED.name, "10.00 ± 0.00"),
        ("4 → 8 → 16 px", plan.UNGUIDED.name, "0.00 ± 0.00"),
    ]
    trained = table.trainings_table(runs)
    assert [row[0] for row in trained.rows] == ["16 px", "8 → 16 px", "4 → 8 → 16 px"]
    assert trained.rows[1][4:] == ("11 ± 1", "0.2000 ± 0.1000, 0.2000 ± 0.1000")
    assert trained.title.startswith("3 trainings of each cascade, 7 steps, 30 digits a set")
